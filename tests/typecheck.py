"""The run-time type checker of the tests: beartype that takes an int for a float."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
