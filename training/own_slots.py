"""Slots of hand-written frames: invented people, places and numbers that belong to nobody."""

import random
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Final

_FILE: Final = Path(__file__).with_name("texts") / "slots.txt"
_SLOT: Final = re.compile(r"\{([^{}]+)\}")
_NAME: Final = re.compile(r"(?P<key>[A-Za-z_]+)(?P<number>\d?)")
_PERSON: Final = ("name", "first", "last", "he", "him", "his")
_PRONOUNS: Final = (("she", "her", "her"), ("he", "him", "his"))

Make = Callable[[random.Random], str]


def fill(text: str, chance: random.Random) -> str:
    """`text` with every slot filled, the same slot alike everywhere. KeyError names one unknown."""
    known: dict[str, str] = {}

    def value(match: re.Match[str]) -> str:
        inner = match[1]
        if "|" in inner:
            return chance.choice(inner.split("|"))
        return _value(inner, known, chance)

    return _SLOT.sub(value, text)


def _value(slot: str, known: dict[str, str], chance: random.Random) -> str:
    key = slot[0].lower() + slot[1:]
    if key not in known:
        _draw(key, known, chance)
    return known[key] if slot[0].islower() else known[key][0].upper() + known[key][1:]


def _draw(key: str, known: dict[str, str], chance: random.Random) -> None:
    name = _NAME.fullmatch(key)
    if name is None:
        raise KeyError(f"no slot of this form: {key}")
    if name["key"] in _PERSON:
        _draw_person(name["number"], known, chance)
        return
    taken = {known[other] for other in known if other.rstrip("0123456789") == name["key"]}
    for _ in range(20):  # another one than {key} and {key2} have
        known[key] = _made(name["key"], chance)
        if known[key] not in taken:
            return


def _draw_person(number: str, known: dict[str, str], chance: random.Random) -> None:
    gender = chance.randrange(2)
    first = chance.choice(_pools()["woman" if gender == 0 else "man"])
    last = chance.choice(_pools()["surname"])
    values = (f"{first} {last}", first, last, *_PRONOUNS[gender])
    known.update({f"{key}{number}": value for key, value in zip(_PERSON, values, strict=True)})


def _made(key: str, chance: random.Random) -> str:
    if key in _MAKERS:
        return _MAKERS[key](chance)
    return chance.choice(_pools()[key])


@cache
def _pools() -> Mapping[str, list[str]]:
    """Name to entries, from lines `name = one | two`; a name may have several lines."""
    pools: dict[str, list[str]] = {}
    for line in _FILE.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, entries = line.partition("=")
            pools.setdefault(name.strip(), []).extend(e.strip() for e in entries.split("|"))
    return pools


def _digits(count: int, chance: random.Random) -> str:
    return "".join(chance.choice("0123456789") for _ in range(count))


def _pick(key: str, chance: random.Random) -> str:
    return chance.choice(_pools()[key])


def _address(chance: random.Random) -> str:
    house, street, town = chance.randint(2, 189), _pick("street", chance), _pick("town", chance)
    flat = f"Apt {chance.randint(1, 9)}{chance.choice('ABCD')}"
    forms = (
        f"{house} {street}, {town}",
        f"{house} {street}, {town}",
        f"{house} {street}, flat {chance.randint(1, 14)}, {town}",
        f"{house} {street}, {flat}, {town} {_digits(5, chance)}",
        f"{street} {house}, {town}",
    )
    return chance.choice(forms)


def _phone(chance: random.Random) -> str:
    """555-0100 to 555-0199 are kept free for fiction."""
    end = f"01{_digits(2, chance)}"
    area = chance.randint(201, 989)
    return chance.choice(
        (f"555-{end}", f"({area}) 555-{end}", f"{area}-555-{end}", f"+1 {area} 555 {end}")
    )


def _card(chance: random.Random) -> str:
    """Sixteen digits whose check digit is wrong, so that no card has them."""
    digits = "4" + _digits(14, chance)
    right = next(d for d in "0123456789" if _luhn(digits + d))
    number = digits + str((int(right) + 1 + chance.randrange(9)) % 10)
    return " ".join(number[at : at + 4] for at in range(0, 16, 4))


def _luhn(number: str) -> bool:
    doubled = [int(d) * (2 - at % 2) for at, d in enumerate(number)]
    return sum(d - 9 if d > 9 else d for d in doubled) % 10 == 0


def _idnumber(chance: random.Random) -> str:
    """Nine digits from 9 on with 10 to 49 in the middle: of a range that nobody is given."""
    return f"9{_digits(2, chance)}-{chance.randint(10, 49)}-{_digits(4, chance)}"


def _email(chance: random.Random) -> str:
    who = f"{_pick(chance.choice(('woman', 'man')), chance)}.{_pick('surname', chance)}".lower()
    return f"{who}@{chance.choice(('example.com', 'example.org', 'mail.example', 'post.example'))}"


def _password(chance: random.Random) -> str:
    word, other = _pick("password_word", chance), _pick("password_word", chance)
    forms = (
        f"{word}{chance.randint(10, 2024)}",
        f"{word.capitalize()}!{_digits(2, chance)}",
        f"{word}_{other}{_digits(1, chance)}",
        f"{word.capitalize()}{other.capitalize()}{_digits(2, chance)}#",
    )
    return chance.choice(forms)


def _dob(chance: random.Random) -> str:
    day, month, year = chance.randint(1, 28), chance.randint(1, 12), chance.randint(1948, 2001)
    return chance.choice(
        (
            f"{day} {_pick('month', chance)} {year}",
            f"{month:02}/{day:02}/{year}",
            f"{year}-{month:02}-{day:02}",
        )
    )


_MAKERS: Final[Mapping[str, Make]] = {
    "address": _address,
    "phone": _phone,
    "card": _card,
    "idnumber": _idnumber,
    "email": _email,
    "password": _password,
    "dob": _dob,
    "account": lambda chance: _digits(chance.choice((8, 9, 10)), chance),
    "passport": lambda chance: f"X{_digits(7, chance)}",
    "plate": lambda chance: (
        f"{''.join(chance.choices('ABCDEFGHJKLMNPRSTVWXYZ', k=3))} {_digits(3, chance)}"
    ),
    "ip": lambda chance: (
        f"{chance.choice(('192.0.2', '198.51.100', '203.0.113'))}.{chance.randint(1, 254)}"
    ),
    "time": lambda chance: (
        f"{chance.randint(5, 11)}:{chance.choice(('00', '10', '15', '30', '45'))}"
    ),
    "n": lambda chance: str(chance.randint(3, 40)),
    "year": lambda chance: str(chance.randint(1995, 2024)),
    "money": lambda chance: f"{chance.choice('$$€£')}{chance.randint(2, 95) * 10}",
    "open": lambda _: "{",
    "close": lambda _: "}",
}
