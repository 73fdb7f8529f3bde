"""Tasks of gpu/suite.py that several of its tests use."""


def case(what: str, direction: str = "forward", **fields) -> dict:
    task = {"section": "numerics", "what": what, "direction": direction, "m": 7}
    task |= {"n": 96, "k": 512, "dtype": "bfloat16", "codebook": "nf4", "exact": False}
    return task | {"rank": 0, "check": "error"} | fields


def numbered(*whats: str) -> list[dict]:
    return [
        {"section": "numerics", "what": w, "i": i, "direction": "forward"}
        | {"dtype": "bfloat16", "check": "bits", "m": i, "n": 1, "k": 1}
        for i, w in enumerate(whats)
    ]
