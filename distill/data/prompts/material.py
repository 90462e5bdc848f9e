"""The words that shipped prompts are made of. Answers are asked to be short: a small student learns from many."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Template(NamedTuple):
    """Sentences with numbered places, and the lists that fill them."""

    forms: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]
    system: str | None = None


class Problem(NamedTuple):
    """A word problem in a, b, name and thing, and its answer."""

    text: str
    answer: Callable[[int, int], int]


TOPICS = (
    "rain", "the moon", "gravity", "a volcano", "photosynthesis", "the water cycle", "an earthquake", "a rainbow",
    "thunder", "the tides", "a battery", "electricity", "magnets", "sound", "light", "heat", "friction", "evaporation",
    "the heart", "the lungs", "sleep", "dreams", "memory", "digestion", "bones", "muscles", "vaccines", "a fever",
    "trees", "flowers", "seeds", "bees", "birds", "whales", "spiders", "dinosaurs", "cats", "dogs", "horses", "fish",
    "a bridge", "a bicycle", "a clock", "a telescope", "a camera", "a refrigerator", "an engine", "an airplane",
    "a submarine", "a windmill", "solar panels", "a computer", "the internet", "a password", "a search engine",
    "an algorithm", "a database", "encryption", "a keyboard", "a satellite", "GPS", "a robot", "a 3D printer",
    "money", "a bank", "taxes", "inflation", "a budget", "insurance", "a contract", "an election", "a law", "a museum",
    "a library", "a newspaper", "a map", "a calendar", "the alphabet", "a poem", "a novel", "a metaphor", "music",
    "a symphony", "jazz", "painting", "sculpture", "photography", "theatre", "dance", "chess", "football", "swimming",
    "bread", "cheese", "coffee", "tea", "chocolate", "salt", "sugar", "olive oil", "rice", "soup", "recycling",
    "a desert", "a rainforest", "the ocean", "a glacier", "a river", "an island", "the North Pole", "a city",
    "a village", "a farm", "a market", "a hospital", "a school", "friendship", "patience", "curiosity", "honesty",
)  # fmt: skip

AUDIENCES = ("a child", "a teenager", "a grandparent", "a beginner", "someone in a hurry", "a curious friend",
             "a new colleague", "a student")  # fmt: skip

ACTIONS = (
    "boil an egg", "make tea", "bake bread", "clean a window", "water plants", "plant a tree", "pack a suitcase",
    "write a letter", "plan a party", "study for an exam", "learn a new word", "fall asleep faster", "wake up early",
    "save money", "choose a book", "fix a flat tyre", "wash a car", "fold a shirt", "iron a shirt", "sharpen a knife",
    "cook rice", "make a salad", "make soup", "brew coffee", "store vegetables", "clean a keyboard", "back up files",
    "choose a strong password", "spot a scam email", "reset a router", "free up phone storage", "take a good photo",
    "draw a cat", "read a map", "give directions", "introduce yourself", "say no politely", "apologise", "thank a host",
    "run a meeting", "take notes", "prepare for an interview", "write a CV", "ask for a raise", "calm down",
    "stretch your back", "warm up before a run", "train a puppy", "brush a cat", "paint a wall", "hang a picture",
    "unclog a sink", "change a light bulb", "save energy at home", "recycle paper", "start a garden", "make compost",
    "keep a diary", "learn to juggle", "play a simple card game",
)  # fmt: skip

PAIRS = (
    "tea and coffee", "cats and dogs", "summer and winter", "trains and planes", "books and films",
    "cities and villages", "running and walking", "apples and oranges", "pens and pencils", "rivers and lakes",
    "the sun and the moon", "bread and rice", "bicycles and cars", "email and letters", "phones and laptops",
    "bees and wasps",
    "butter and olive oil", "cotton and wool", "gold and silver", "wood and metal", "paper books and e-books",
    "chess and checkers", "football and tennis", "violins and guitars", "poems and stories", "rain and snow",
    "breakfast and dinner", "early mornings and late nights", "renting and buying a home", "saving and spending",
    "working at home and working in an office", "glass and plastic", "frogs and toads", "crocodiles and alligators",
    "solar power and wind power", "maps and GPS", "oil paint and watercolour", "theatre and cinema",
    "desktop computers and tablets", "swimming and cycling",
)  # fmt: skip

SENTENCES = (
    "The meeting is moved to Friday because the room is being painted.",
    "I can't come to dinner since I have to finish a report for work.",
    "Our train was late, so we missed the first half of the concert.",
    "The shop on the corner sells fresh bread, but only until noon.",
    "She lost her keys on the way home and had to call a neighbour.",
    "If it rains tomorrow we will play cards inside instead of going to the park.",
    "The new library is bigger than the old one and stays open on Sundays.",
    "He forgot to water the plants, and now half of them are dry.",
    "Please send me the photos from the trip when you find the time.",
    "The soup needs more salt, and the potatoes are not done yet.",
    "My phone battery dies after two hours, so I carry a charger everywhere.",
    "They painted the door green because the old colour made the house look dark.",
    "We should leave early to avoid the traffic near the stadium.",
    "The doctor told him to rest for a week and to drink a lot of water.",
    "Nobody answered the phone, so I wrote an email and waited.",
    "The children built a tower of books that was taller than their teacher.",
    "Because the lift is broken, everybody has to take the stairs this week.",
    "I bought a second-hand bicycle that works better than my new one.",
    "The museum is free on Mondays, but you have to book a ticket online.",
    "After the storm there was no light in the village for two days.",
    "The cat sleeps on the printer whenever somebody needs to print.",
    "Our team finished the project early and nobody knew what to do next.",
    "It is cheaper to cook at home, but it takes more time than ordering.",
    "The old clock in the hall stopped on the day that we moved in.",
)
STYLES = ("more formal", "friendlier", "shorter", "simpler", "more polite", "more cheerful", "as a question",
          "in the past tense", "as advice", "as a short message to a friend")  # fmt: skip

PASSAGES = tuple(
    f"{SENTENCES[i]} {SENTENCES[(i + second) % len(SENTENCES)]} {SENTENCES[(i + third) % len(SENTENCES)]}"
    for second, third in ((7, 13), (5, 11), (3, 17), (9, 19), (1, 10), (15, 4), (20, 8), (2, 16))
    for i in range(len(SENTENCES))
)

KINDS = (
    "animals that live in water", "things in a kitchen", "words that describe the weather", "jobs in a hospital",
    "ways to travel", "healthy snacks", "gifts for a friend", "things to pack for the beach", "rules for a classroom",
    "reasons to read", "games for a rainy day", "tools in a garage", "vegetables", "musical instruments",
    "polite ways to say no", "things that are round", "sports without a ball", "ideas for a picnic",
    "ways to save water", "questions to ask in an interview", "names for a boat", "topics for a conversation",
    "things that need electricity", "good habits", "flowers for a small garden", "steps of a morning routine",
    "uses of an old jar", "things to check before a trip", "signs that it will rain", "books that a child may like",
    "ways to cheer somebody up", "exercises for the back", "breakfast ideas", "materials for building a house",
    "places to visit in a city", "sounds in a forest", "things you can do in ten minutes", "ways to learn a language",
    "reasons to save money", "things that a dog needs",
)  # fmt: skip

SITUATIONS = (
    "a customer whose parcel is late", "a tourist who lost the way", "a friend who failed a test",
    "a neighbour whose music is loud", "a child who does not want to sleep", "a colleague who is ill",
    "a guest who arrives early", "a student who missed a lesson", "a caller with a wrong number",
    "a passenger on a delayed train", "a patient who fears the dentist", "a friend who moves away",
    "a waiter who brought the wrong dish", "a new neighbour", "a shy person at a party", "a teammate after a defeat",
    "a librarian about a lost book", "a landlord about a broken heater", "a teacher about homework",
    "a friend who got a new job", "a cousin who is getting married", "a shopkeeper about a refund",
    "a driver who blocks the way", "a doctor about a headache", "a boss about a day off",
)  # fmt: skip
MOODS = ("kind", "calm", "funny", "short and clear", "formal", "encouraging", "honest", "patient")

REQUESTS = (
    "remind me to call the dentist", "tell me what to cook with eggs and rice", "help me plan a quiet Sunday",
    "suggest a name for a cat", "find a word that rhymes with light", "write a birthday wish for my sister",
    "draft a text that I am running late", "explain what a firewall does", "give me a tip to focus",
    "suggest a warm-up for running", "tell me how many days are in a leap year", "name a good present for a teacher",
    "translate good morning into French", "tell me whether tomatoes are a fruit", "suggest music for dinner",
    "help me word an invitation", "tell me what to wear when it is cold and wet", "give me a riddle",
    "tell me a fact about the sea", "suggest a password rule that I can remember", "explain airplane mode",
    "tell me how to greet a new neighbour", "help me decide between tea and coffee",
    "give me a packing list for one night", "tell me how long to boil an egg", "suggest a healthy snack",
    "explain what a calorie is", "tell me what a byte is", "help me say sorry to a friend",
    "write a short note for the fridge",
)  # fmt: skip
MANNERS = ("in one sentence", "in two sentences", "briefly", "in simple words", "like a friend would",
           "without small talk", "and say why")  # fmt: skip

NAMES = ("Ada", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kemi", "Liam", "Mina",
         "Nils", "Olga", "Pablo", "Rosa", "Sam", "Tara", "Yuki")  # fmt: skip
THINGS = ("apples", "books", "coins", "marbles", "stamps", "eggs", "pencils", "cookies", "shells", "tickets")

PROBLEMS = (
    Problem("{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", lambda a, b: a + b),
    Problem("{name} has {a} {thing} and gives away {b}. How many {thing} are left?", lambda a, b: a - b),
    Problem("{name} fills {b} boxes with {a} {thing} each. How many {thing} is that in all?", lambda a, b: a * b),
    Problem("What is {a} plus {b}? Answer with the number.", lambda a, b: a + b),
    Problem("What is {a} minus {b}? Answer with the number.", lambda a, b: a - b),
    Problem("What is {a} times {b}? Answer with the number.", lambda a, b: a * b),
    Problem("{name} buys {b} {thing} for {a} cents each. How many cents does {name} pay?", lambda a, b: a * b),
    Problem("{name} reads {a} pages on Monday and {b} on Tuesday. How many pages is that?", lambda a, b: a + b),
)

TEMPLATES: dict[str, Template] = {
    "explain": Template(
        ("Explain {0} to {1} in two or three sentences.", "How would you describe {0} to {1}? Keep it short.",
         "What should {1} know about {0}? Answer in two sentences."),
        (TOPICS, AUDIENCES),
    ),
    "define": Template(
        ("What is meant by {0}? Answer in one sentence{1}.", "Define {0} in one sentence{1}.",
         "Give a short definition of {0}{1}.", "In a few words, what do people mean by {0}{1}?"),
        (TOPICS, ("", " with an example", " without technical terms", " that a child understands")),
    ),
    "how_to": Template(
        ("How do I {0}? Give {1} short steps.", "List {1} short steps to {0}.", "What are {1} tips to {0}?",
         "I have never tried to {0}. Tell me {1} things to get right."),
        (ACTIONS, ("two", "three", "four")),
    ),
    "compare": Template(
        ("Compare {0} in {1}.", "What is the difference between {0}? Answer in {1}.",
         "Name one thing that {0} have in common, in {1}.", "When talking about {0}, what matters most? Use {1}."),
        (PAIRS, ("one sentence", "two sentences", "three sentences", "simple words", "a few words")),
    ),
    "rewrite": Template(
        ("Rewrite this {1}: {0}", "Say this {1}: {0}", "Change the sentence so that it reads {1}. Sentence: {0}"),
        (SENTENCES, STYLES),
    ),
    "summarise": Template(
        ("Summarise in {1}: {0}", "What is the main point? Use {1}. Text: {0}", "Shorten this to {1}. {0}",
         "Read this and answer in {1}: what happened? {0}", "Give this text a title of {1}: {0}"),
        (PASSAGES, ("one sentence", "five words", "ten words", "one short line", "plain words")),
    ),
    "list": Template(
        ("List {1} {0}.", "Name {1} {0}.", "Give me {1} {0}, separated by commas.", "Can you think of {1} {0}?"),
        (KINDS, ("two", "three", "four", "five", "six")),
    ),
    "dialogue": Template(
        ("Write one {1} sentence to say to {0}.", "What {1} words would you find for {0}?",
         "Give me a reply, {1} in tone, for {0}.", "Write two sentences for {0} and keep them {1}."),
        (SITUATIONS, MOODS),
    ),
    "assistant": Template(
        ("Please {0}, {1}.", "Can you {0}, {1}?", "Could you {0}, {1}?", "I need help: {0}, {1}."),
        (REQUESTS, MANNERS),
        "You are a helpful assistant on a phone. Answer briefly.",
    ),
}  # fmt: skip
