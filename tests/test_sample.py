"""The sample data that ships with the package: every answer follows the schema, and no test wording is a training wording with other slots."""
import json
import re
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import pytest
import sftkit

FOLDER = Path(sftkit.__file__).parent / "sample"
ACTIONS = {"light": {"on", "off", "set"}, "heating": {"on", "off", "set"}, "blinds": {"open", "close"}, "door": {"lock", "unlock"},
           "music": {"on", "off", "set"}, "alarm": {"set", "off"}}
COLOURS = {"red", "blue", "green", "orange", "purple", "pink", "white", "yellow", "turquoise", "teal", "violet", "amber"}
DEVICE_WORDS = ("light lights lamp lamps bulb bulbs heating heater heaters radiator radiators thermostat fan fans ventilator ventilators blind blinds shade shades "
                "shutter shutters curtain curtains door doors music song songs tune tunes playlist album speaker speakers radio vacuum hoover robot robots alarm alarms "
                "buzzer clock").split()
HOURS = "five six seven eight nine".split()
SHARED_WORDS = 4       # most consecutive words, slots counting as one, that a test wording shares with any training wording
SIMILARITY = 0.85      # difflib ratio of a test wording to its nearest training wording; 0.8 is one verb changed in "close DEVICE ROOM"


def load(name):
    rows = [json.loads(line)["messages"] for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row[0]["content"], row[1]["content"]) for row in rows]


TRAIN, TEST = load("train"), load("test")
ROOMS = {json.loads(answer)["room"] for _, answer in TRAIN + TEST} - {"all"}


def alternatives(words): return "|".join(sorted(words, key=len, reverse=True))


def template(wording):
    "The words of `wording` with rooms, devices, colours and numbers replaced, and with a slot's own preposition and article dropped."
    text = re.sub(rf"\b({alternatives(ROOMS)}|(?:whole|entire) (?:house|home))\b", "ROOM", wording.lower())
    text = re.sub(rf"\d\d?:\d\d|\bhalf past (?:{alternatives(HOURS)})\b|\b(?:{alternatives(HOURS)}) o'clock|\d+(?: ?%| percent)?", "NUMBER ", text)
    text = re.sub(rf"\b({alternatives(COLOURS)})\b", "COLOUR", text)
    text = re.sub(rf"\b({alternatives(DEVICE_WORDS)})\b", "DEVICE", text)
    text = re.sub(r"\b(?:(?:in|of|for|to|from|into|around|on|at) )?(?:(?:the|my|that|its|this) )?(ROOM|DEVICE)\b", r"\1", text)
    return tuple(re.findall(r"[A-Za-z']+", text))


def test_rows_are_one_question_and_one_answer():
    for name in ("train", "test"):
        for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert list(row) == ["messages"]
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"]


def check_answer(wording, answer):
    command = json.loads(answer)
    assert answer == json.dumps(command)
    device, action, value = command["device"], command["action"], command.get("value")
    assert list(command) == ["device", "room", "action"] + ["value"] * (action == "set")
    assert action in ACTIONS[device]
    room = command["room"]
    assert room in wording if room != "all" else not re.search(rf"\b({alternatives(ROOMS)})\b", wording)
    if action != "set": return
    if device == "alarm": assert re.fullmatch(r"0[5-9]:[0-5]\d", value)
    elif device == "heating": assert type(value) is int and 15 <= value <= 25
    elif isinstance(value, str): assert device == "light" and value in COLOURS and value in wording
    else: assert type(value) is int and 0 < value <= 100
    if type(value) is int: assert str(value) in wording or "half" in wording or "full" in wording


def test_answers_follow_the_schema():
    for wording, answer in TRAIN + TEST: check_answer(wording, answer)


def test_sizes():
    assert 400 <= len(TRAIN) <= 700 and 60 <= len(TEST) <= 100


def test_no_wording_occurs_twice():
    wordings = [wording.lower() for wording, _ in TRAIN + TEST]
    assert max(Counter(wordings).values()) == 1


def test_labels_are_unambiguous():
    "One training template always asks for the same device and action."
    meaning = {}
    for wording, answer in TRAIN:
        slots = re.sub(rf"\b({alternatives(ROOMS)})\b", "ROOM", wording)
        command = json.loads(answer)
        kind = command["device"], command["action"]
        assert meaning.setdefault(slots, kind) == kind, wording


def test_slots_are_balanced():
    commands = [json.loads(answer) for _, answer in TRAIN]
    rooms = Counter(c["room"] for c in commands if c["room"] != "all")
    intents = Counter((c["device"], c["action"], isinstance(c.get("value"), str)) for c in commands)
    colours = Counter(c["value"] for c in commands if c["device"] == "light" and isinstance(c.get("value"), str))
    degrees = Counter(c["value"] for c in commands if c["device"] == "heating" and c["action"] == "set")
    assert len(intents) == 16 and len(rooms) == 18
    for counts in (rooms, intents, colours, degrees): assert max(counts.values()) <= 2 * min(counts.values()), counts
    tested = Counter((c["device"], c["action"], isinstance(c.get("value"), str)) for c in (json.loads(answer) for _, answer in TEST))
    assert set(tested) == set(intents) and min(tested.values()) >= 4 and max(tested.values()) <= 5


def test_values_are_partly_new():
    rooms = [[json.loads(answer)["room"] for _, answer in rows] for rows in (TRAIN, TEST)]
    new = sum(room not in rooms[0] for room in rooms[1])
    assert 0.25 <= new / len(TEST) <= 0.5


TEMPLATES = {template(wording) for wording, _ in TRAIN}


@pytest.mark.parametrize("wording", [wording for wording, _ in TEST])
def test_wording_is_held_out(wording):
    words = template(wording)
    for other in TEMPLATES:
        match = SequenceMatcher(None, words, other, autojunk=False)
        shared = match.find_longest_match()
        assert shared.size <= SHARED_WORDS, (wording, other, words[shared.a:shared.a + shared.size])
        assert match.ratio() < SIMILARITY, (wording, other)


def test_template_replaces_every_slot():
    assert template("turn the lamp in the living room to red, then 40 percent at half past six") == (
        "turn", "DEVICE", "ROOM", "to", "COLOUR", "then", "NUMBER", "at", "NUMBER")
