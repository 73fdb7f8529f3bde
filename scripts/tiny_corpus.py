"""The text behind the embedded assets: stories to pretrain on, and the record task.

Two to four people each have something happen to them (a thing, a place, a day), and the
rest of the story says some of it again: in talk, in letters, in lists. Predicting the
second mention means looking up the first, which is the skill that the task needs. The
stories never show a record.

All of it is drawn from the lists in this file by one seeded generator.
"""

import dataclasses
import random

WOMEN = """Ada Anna Bea Clara Dina Ella Emma Fatima Flora Grace Greta Hana Ida Iris Kira
Lena Lily Lucy Maria Maya Mina Molly Nadia Nina Nora Olga Priya Rosa Ruth Sara Vera
Zoe""".split()
MEN = """Adam Amir Ben Boris Carl David Dev Emil Felix Finn Frank Hugo Ivan Jack Jonas Kenji
Kofi Leo Luca Max Milo Nico Noah Omar Oscar Otto Paul Peter Ravi Sam Theo Tom""".split()
# Every adjective starts with a consonant sound, so that the article is always "a".
ADJECTIVES = """red blue green yellow brown black white grey golden silver wooden
glass paper leather tiny striped""".split()
NOUNS = """lantern kite ball hat coat drum flute bell box basket book map key ring clock
mirror candle cup plate kettle ladder rope boat wheel bucket hammer brush scarf boot mask
doll coin feather shell cake pillow""".split()
PAIRS = tuple((adjective, noun) for adjective in ADJECTIVES for noun in NOUNS)
# Noun of the place -> the preposition it takes.
PLACES = {
    "kitchen": "in", "garden": "in", "forest": "in", "library": "in", "barn": "in",
    "attic": "in", "school": "in", "cave": "in", "tower": "in", "park": "in",
    "river": "by", "lake": "by", "gate": "by", "mill": "by", "bridge": "under",
    "market": "at", "station": "at", "hill": "on", "beach": "on", "roof": "on",
}  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
# Infinitive -> past tense.
VERBS = {
    "find": "found", "buy": "bought", "lose": "lost", "hide": "hid", "leave": "left",
    "see": "saw", "mend": "mended", "drop": "dropped",
}  # fmt: skip

EVENTS = (
    "{who} {past} a {item} {at} on {day}.",
    "On {day} {who} {past} a {item} {at}.",
    "On {day}, {at}, {who} {past} a {item}.",
    "It was {day} when {who} {past} a {item} {at}.",
    "{who} went to the {place} on {day} and {past} a {item} there.",
    "On {day} {who} walked to the {place}, where {she} {past} a {item}.",
    "{who} was {at} on {day}. That was where {she} {past} a {item}.",
    "There was a {item} {at}. {who} {past} it on {day}.",
)

# What a story says again. In each, one part of an event is asked of the others.
RECALLS = (
    '"Who {past} the {item}?" asked {other}. "It was {who}," said {third}.',
    '"What did {who} {verb}?" asked {other}. "A {item}," said {third}.',
    '"Where did {who} {verb} the {item}?" asked {other}. "{At}," said {third}.',
    '"When did {who} {verb} the {item}?" asked {other}. "On {day}," said {third}.',
    '"Which day was {who} {at}?" asked {other}. "It was {day}," said {third}.',
    '"Which place did {who} go to?" asked {other}. "The {place}," said {third}.',
    '"Who was {at}?" asked {other}. "That was {who}," said {third}.',
    '"Whose is this {item}?" asked {other}. "It is for {who}," said {third}.',
    "{who} still thought about the {item}.",
    "{who} told {her} mother about the {place} and about the {item}.",
    "{other} wanted to see the {item}, so {who} took {other} to the {place}.",
    "The next {day}, {who} went back to the {place}.",
    "Nobody but {who} knew about the {item}.",
    "So it was {who} who {past} the {item}, {at}, on {day}.",
    "{who} wrote it down: the {item}, the {place}, {day}.",
    "{who} made a song about it; the song was called The {item} of the {place}.",
    "Dear {other}, on {day} I {past} a {item} {at}. Yours, {who}.",
    "The {noun} was {adjective}, and {who} liked it that way.",
    "It was {who} and nobody else who knew the way to the {place}.",
    '"Listen, {other}: {again}" said {third}.',
    "{other} said it again and again: {again}",
    "{other} remembered {day}, for on that day {who} {past} a {item}.",
)

OPENINGS = (
    "It had been a long week.", "The week began with rain.", "Snow lay on the road.",
    "The days were warm; the nights were cold.", "Once there were {count} friends.",
    "This is the story of {names}.", "{names} lived in the same street.",
    "Nobody could say how it all began.", "There is little to record about that week.",
    "In those days {names} were always busy.", "Here is what the old book says.",
)  # fmt: skip
FILLERS = (
    "The wind blew over the fields.", "A dog barked somewhere.", "{other} was asleep.",
    "{other} stayed at home and baked bread.", "A bird sang in the old tree.",
    "{other} had a cold and drank hot tea.", "The moon was bright that night.",
    "{other} laughed for a long time.", "All the shops were closed.",
    "{other} sat down and read a letter.", "The road was empty and quiet.",
    "Nothing else happened for a while.", "{other} fed the cat and the hens.",
)  # fmt: skip
ENDINGS = (
    "That was the end of it.", "And they all went home.", "Then it was time for bed.",
    "They talked about it for years.", "The lamp was put out, and all was still.",
    "So ended a good week.",
)  # fmt: skip
# Songs and lists said twice or more: the plainest copying, from which lookup grows.
REFRAINS = (
    "They sang as they went: {line}. And once more: {line}. At home again: {line}.",
    '"Say it after me," said {who}: "{line}." "{line}," said {other}. "{line}."',
    "{who} packed a big bag: {line}. Later {who} took it all out again: {line}.",
    "The old man counted: {line}. {who} counted too: {line}.",
    "On the wall it said: {line}. {who} read it aloud: {line}. {other} wrote: {line}.",
)
COUNTS = ("no", "one", "two", "three", "four")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened: who did what, with which thing, where and on which day.

    Attributes:
      who: Name of the person.
      feminine: Whether the pronoun for `who` is "she" rather than "he".
      adjective: First word of the thing.
      noun: Second word of the thing.
      place: Noun of the place, a key of PLACES.
      day: Day of the week.
      verb: Infinitive, a key of VERBS.
    """

    who: str
    feminine: bool
    adjective: str
    noun: str
    place: str
    day: str
    verb: str

    def fields(self) -> dict[str, str]:
        """Returns the values that the sentence patterns above name."""
        at = f"{PLACES[self.place]} the {self.place}"
        return {
            "who": self.who, "adjective": self.adjective, "noun": self.noun,
            "item": f"{self.adjective} {self.noun}", "place": self.place, "at": at,
            "At": at[0].upper() + at[1:], "day": self.day, "verb": self.verb,
            "past": VERBS[self.verb], "she": "she" if self.feminine else "he",
            "her": "her" if self.feminine else "his",
        }  # fmt: skip

    def record(self) -> str:
        """Returns the output of a task row; it starts with the joining space."""
        return (
            f" item: {self.adjective} {self.noun}; place: {self.place}; day: {self.day}"
        )


def invent_name(rng: random.Random) -> str:
    """Returns a made-up name, so that copying is learned and not only a list of names."""
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3)]
    return "".join(syllables[: rng.choice((2, 3))]).capitalize() + rng.choice("lnrsk")


def make_events(
    rng: random.Random, people: list[str], pairs: list[tuple[str, str]], count: int
) -> list[Event]:
    """Returns `count` events of which no two share a person, a noun, a place or a day.

    Args:
      rng: Source of randomness.
      people: Names to draw from.
      pairs: (adjective, noun) pairs to draw from.
      count: Number of events, at most 7.
    """
    chosen: list[tuple[str, str]] = []
    while len(chosen) < count:
        pair = rng.choice(pairs)
        if all(pair[0] != a and pair[1] != n for a, n in chosen):
            chosen.append(pair)
    names, places = rng.sample(people, count), rng.sample(list(PLACES), count)
    days, verbs = rng.sample(DAYS, count), rng.choices(list(VERBS), k=count)
    return [
        Event(
            who=name,
            feminine=name in WOMEN or (name not in MEN and rng.random() < 0.5),
            adjective=pair[0],
            noun=pair[1],
            place=place,
            day=day,
            verb=verb,
        )  # fmt: skip
        for name, pair, place, day, verb in zip(
            names, chosen, places, days, verbs, strict=True
        )
    ]


def make_refrain(rng: random.Random, people: list[str]) -> str:
    """Returns a short text in which one line of names, things or places comes back."""
    kinds = (
        lambda: rng.choice(people),
        lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}",
        lambda: rng.choice(NOUNS),
        lambda: f"the {rng.choice(list(PLACES))}",
        lambda: rng.choice((rng.choice(people), rng.choice(NOUNS), rng.choice(DAYS))),
    )
    kind, joint = rng.choice(kinds), rng.choice((", ", "; ", " and "))
    line = joint.join(kind() for _ in range(rng.randint(3, 9)))
    who, other = rng.sample(people, 2)
    return rng.choice(REFRAINS).format(line=line, who=who, other=other)


def make_story(rng: random.Random, invented: float = 0.1) -> str:
    """Returns one story of about 150 tokens: opening, events, recalls, ending.

    Args:
      rng: Source of randomness.
      invented: Chance that the people of the story have made-up names.
    """
    people = WOMEN + MEN
    if rng.random() < invented:
        people = sorted({invent_name(rng) for _ in range(12)})
    if rng.random() < 0.25:
        return make_refrain(rng, people)
    events = make_events(rng, people, PAIRS, rng.choice((1, 1, 2, 2, 3, 3, 4)))
    cast = [event.who for event in events]
    outsiders = [name for name in rng.sample(people, 6) if name not in cast] or ["he"]
    names = ", ".join(cast[:-1]) + " and " + cast[-1] if len(cast) > 1 else cast[0]
    count = COUNTS[len(cast)]

    def filler() -> str:
        return rng.choice(FILLERS).format(other=rng.choice(outsiders))

    sentences = []
    if rng.random() < 0.6:
        openings = OPENINGS if len(cast) > 1 else OPENINGS[:3]
        sentences.append(rng.choice(openings).format(names=names, count=count))
    told = {event: rng.choice(EVENTS).format(**event.fields()) for event in events}
    for sentence in told.values():
        sentences.append(sentence)
        if rng.random() < 0.2:
            sentences.append(filler())
    choices = [(event, pattern) for event in events for pattern in RECALLS]
    for event, pattern in rng.sample(choices, min(len(choices), rng.randint(4, 9))):
        others = [name for name in cast if name != event.who] + outsiders[:2]
        rng.shuffle(others)
        fields = event.fields() | {
            "other": others[0], "third": others[-1], "again": told[event],
        }  # fmt: skip
        sentences.append(pattern.format(**fields))
        if rng.random() < 0.1:
            sentences.append(filler())
    sentences.append(rng.choice(ENDINGS))
    return " ".join(sentences)


def make_rows(
    rng: random.Random,
    people: list[str],
    pairs: list[tuple[str, str]],
    count: int,
) -> list[dict[str, str]]:
    """Returns `count` different rows of the task.

    Args:
      rng: Source of randomness.
      people: Names that the passages may use.
      pairs: (adjective, noun) pairs that the passages may use.
      count: Number of rows.
    """
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        events = make_events(rng, people, pairs, rng.choice((2, 2, 3)))
        asked = rng.choice(events)
        passage = " ".join(rng.choice(EVENTS).format(**e.fields()) for e in events)
        text = f"{passage}\nRecord for {asked.who}:"
        rows[text] = {"input": text, "output": asked.record()}
    return list(rows.values())


def make_task(
    rng: random.Random, train_count: int, test_count: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns train and test rows that share no person and no adjective-noun pair."""
    people, pairs = WOMEN + MEN, list(PAIRS)
    rng.shuffle(people)
    rng.shuffle(pairs)
    some, many = len(people) * 3 // 4, len(pairs) * 4 // 5
    train = make_rows(rng, people[:some], pairs[:many], train_count)
    return train, make_rows(rng, people[some:], pairs[many:], test_count)
