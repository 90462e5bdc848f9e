"""What the two toy sets are made of: questions and answers of the 8-ball, tools and intents of the tool set.

The text in distill/text/ covers all of it, so that the toy tokenizer writes it in few tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from distill.chat import ToolCall

ANSWERS = (
    "It is certain", "It is decidedly so", "Without a doubt", "Yes definitely", "You may rely on it",
    "As I see it, yes", "Most likely", "Outlook good", "Yes", "Signs point to yes",
    "Reply hazy, try again", "Ask again later", "Better not tell you now", "Cannot predict now",
    "Concentrate and ask again", "Don't count on it", "My reply is no", "My sources say no",
    "Outlook not so good", "Very doubtful",
)  # fmt: skip
"""The classic twenty."""

TOPICS = (
    ("it rain", "it snow", "the sun shine"),
    ("I pass the exam", "my grades get better", "the teacher like my essay"),
    ("I find love", "my crush notice me", "they kiss"),
    ("I get rich", "I win the lottery", "my savings grow"),
    ("I get the job", "my boss be happy", "I have a new career"),
    ("I travel abroad", "we fly to Paris", "I see the ocean"),
    ("my team win", "I run a marathon", "we score a goal"),
    ("dinner taste good", "my cake rise", "the soup be hot"),
    ("my cold go away", "the doctor help me", "I be healthy"),
    ("my cat come home", "the dog behave", "I have a puppy"),
    ("we buy a house", "the roof leak", "my garden bloom"),
    ("my friend visit me", "the party be fun", "my neighbour smile"),
    ("my car start", "the bus be late", "the train arrive"),
    ("my computer break", "the code work", "my phone ring"),
    ("I learn guitar", "the band play", "my song be famous"),
    ("I write a book", "the story end well", "my poem rhyme"),
    ("my sister call", "my parents agree", "grandma dance"),
    ("I sleep well", "my dream mean something", "I wake up early"),
    ("we meet aliens", "humans reach Mars", "the moon fall"),
    ("I find treasure", "my wish come true", "the secret get out"),
)
"""One topic an answer: things that a question can ask about."""

OPENINGS = ("Will", "Can", "Could", "Might", "Should", "Tell me, will", "Be honest, will", "Magic ball, can",
            "Do you see, will", "Please say, could")  # fmt: skip
TIMES = ("", "today", "tomorrow", "tonight", "this week", "next week", "this year", "next year", "soon", "in the end")


def _tool(name: str, description: str, argument: str, values: list[Any]) -> dict[str, Any]:
    properties = {argument: {"enum": values}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS: dict[str, dict[str, Any]] = {
    "lights": _tool("lights", "Switch the lights.", "state", ["on", "off"]),
    "music": _tool("music", "Play music.", "mood", ["calm", "party"]),
    "timer": _tool("timer", "Start a timer.", "minutes", [5, 30]),
    "door": _tool("door", "Control the front door.", "action", ["lock", "open"]),
    "heating": _tool("heating", "Set the heating.", "level", ["low", "high"]),
}
"""Functions that a toy assistant is offered, two at a time."""


class Intent(NamedTuple):
    """What a user can want: the right answer, and the words that ask for it without naming it, in any order."""

    answer: ToolCall | str
    words: tuple[str, str, str]


INTENTS = (
    Intent(ToolCall("lights", {"state": "on"}), ("dark", "night", "shadows")),
    Intent(ToolCall("lights", {"state": "off"}), ("sleepy", "bright", "bed")),
    Intent(ToolCall("music", {"mood": "calm"}), ("relax", "gentle", "tune")),
    Intent(ToolCall("timer", {"minutes": 5}), ("boil", "egg", "breakfast")),
    Intent(ToolCall("door", {"action": "lock"}), ("strangers", "leaving", "safe")),
    Intent(ToolCall("heating", {"level": "high"}), ("cold", "winter", "freezing")),
    Intent("You are welcome.", ("thanks", "kind", "lovely")),
    Intent("I am your assistant.", ("who", "name", "speaking")),
)
"""Six distinct calls and two plain answers. No argument's value stands in a prompt."""

LEADS = ("", "Hey, ", "Please, ", "Listen, ", "Well, ", "Oh dear, ", "Hello, ", "So, ", "Look, ", "Sorry, ")
TRAILS = ("", " now", " please", " again")
