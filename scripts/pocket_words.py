"""The word lists of the pocket corpus and the few ways to draw from them.

Everything the bundled model ever reads is made of these words: nothing is taken from outside.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence


def split(words: str) -> tuple[str, ...]:
    """Return the words of a `|`-separated list."""
    return tuple(words.split("|"))


def hash_share(*key: object) -> int:
    """Return 0..99 for a key, the same on every machine: below n means held out at n percent."""
    digest = hashlib.md5("|".join(map(str, key)).encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 100


def with_article(noun: str) -> str:
    """Return the noun behind `a` or `an`."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capitalize_first(text: str) -> str:
    """Return the text with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]


APPS = split(
    "Maps|Camera|Clock|Calendar|Messages|Phone|Photos|Notes|Weather|Settings|Music|Mail|Calculator"
    "|Browser|Contacts|Files|Translate|Wallet|Health|Podcasts|Books|Recorder|Video|Radio|Chess"
    "|Recipes|News|Banking|Fitness|Store|Compass|Drive|Chat|Taxi|Travel|Games"
)
CONTACTS = split(
    "Anna|Ben|Carla|David|Emma|Felix|Grace|Henry|Ivy|Jack|Kate|Leo|Mia|Noah|Olga|Paul|Quinn|Rosa"
    "|Sam|Tina|Uma|Victor|Wendy|Xavier|Yara|Zoe|Amir|Bella|Carlos|Dora|Elias|Fiona|George|Hanna"
    "|Igor|Julia|Kevin|Laura|Marco|Nina|Oscar|Petra|Ravi|Sofia|Tom|Vera|Will"
)
ROLES = split("Mom|Dad|Grandma|Grandpa|the doctor|the school|the office")
HELD_NAMES = split(
    "Arthur|Beatrix|Cosmo|Delia|Edgar|Freya|Gideon|Hazel|Ingrid|Jonas|Klara|Lorenzo|Matilda|Nestor"
    "|Orla|Piotr|Selma|Tobias|Ulrik|Zelda"
)
ROOMS = split(
    "kitchen|bedroom|bathroom|living room|hallway|office|garage|garden|attic|basement|dining room"
    "|kids room"
)
DEVICES = split(
    "wifi|bluetooth|flashlight|airplane mode|dark mode|mobile data|do not disturb|location|hotspot"
    "|battery saver|night light|auto rotate"
)
CITIES = split(
    "Paris|London|Tokyo|Berlin|Rome|Madrid|Oslo|Cairo|Lima|Delhi|Boston|Chicago|Sydney|Vienna"
    "|Prague|Dublin|Athens|Lisbon|Toronto|Seoul|Warsaw|Zurich|Helsinki|Nairobi"
)
PLACES = split(
    "the airport|the train station|the library|the hospital|the museum|the park|the beach"
    "|the market|the pharmacy|the gym|the zoo|the harbor|the town hall|the stadium|the bakery"
    "|the university|home|work"
)
ITEMS = split(
    "milk|eggs|bread|butter|apples|rice|coffee|tea|cheese|tomatoes|onions|soap|batteries|pasta"
    "|sugar|bananas|salt|honey|paper towels|orange juice|olive oil|dog food|toothpaste|light bulbs"
    "|potatoes|yogurt"
)
LISTS = split("shopping|grocery|todo|packing|party|work")
GENRES = split(
    "jazz|rock|classical music|folk songs|the blues|piano music|lullabies|movie music|dance music"
    "|rain sounds|morning songs|old hits|sea shanties|guitar music"
)
BUTTONS = split(
    "Send|Cancel|OK|Search|Login|Next|Back|Save|Delete|Share|Edit|Play|Pause|Settings|Help|Buy|Add"
    "|Menu|Profile|Submit|Reply|Close|Open|Done"
)
TASKS = split(
    "water the plants|call the bank|feed the cat|take the medicine|pay the rent|pick up the kids"
    "|clean the desk|send the report|buy a gift|charge the bike|wash the car|book the tickets"
    "|return the books|walk the dog|check the oven|lock the shed|fix the lamp|write to the teacher"
    "|take out the trash|bake the cake"
)
QUERY_ADJECTIVES = split("cheap|best|new|old|small|big|used|easy|free")
HANDOVERS = split("login|password|payment|captcha|code|fingerprint")
ORDINALS = split("first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth")
CLOSINGS = split("done|ok|stopped|cancelled")

TEXT_SUBJECTS = split("i|we|they|the team|my brother|your sister|the driver|our neighbor")
TEXT_VERBS = split("will be|are still|left the bag|want to go|may come|need to stay|can meet")
TEXT_VERBS_SINGULAR = split(
    "will be|is still|left the bag|wants to go|may come|needs to stay|can meet"
)
TEXT_PLACES = split(
    "at the station|on the bus|in the park|near the bridge|at home|behind the school|by the river"
    "|at the cafe|in the garden|under the old tree"
)
TEXT_TIMES = split(
    "soon|after lunch|before dark|at nine|with the kids|on friday|in ten minutes|again|this evening"
    "|tomorrow morning|without you|for a while"
)
GREETINGS = split(
    "hello|good luck|see you|thank you|happy birthday|where are you|i miss you|call me back"
)

COLORS = split("blue|red|green|yellow|white|black|brown|pink|orange|purple|silver|golden|gray")
OBJECTS = split(
    "box|ball|book|cup|key|hat|coat|lamp|bag|bottle|chair|phone|pen|plate|shoe|toy|clock|kite|spoon"
    "|basket|drum|boat|letter|blanket|candle|mirror"
)
LOCATIONS = split(
    "in the kitchen|on the table|under the bed|in the garden|on the shelf|behind the door"
    "|in the car|near the window|on the roof|in the drawer|at the school|next to the tree"
    "|in the attic|under the chair|on the floor|in the garage|by the lake|inside the tent"
    "|on the bench|in the barn"
)
JOBS = split(
    "teacher|doctor|farmer|baker|pilot|painter|driver|nurse|sailor|singer|cook|gardener|builder"
    "|writer|dancer|fisher"
)

CONSONANTS = split(
    "b|c|d|f|g|h|j|k|l|m|n|p|r|s|t|v|w|z|br|cl|dr|fl|gr|pr|st|th|sh|tr|ch|qu|b|d|g|k|l|m|n|p|r|s|t"
)
VOWELS = split("a|e|i|o|u|a|e|i|o|u|ie|ea|ou|y|ia")
FINALS = split("n|r|l|s|t|m|d|k|x")

UNITS = split(
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen"
    "|sixteen|seventeen|eighteen|nineteen"
)
TENS = split("||twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety")


def number_words(number: int) -> str:
    """Return 0..100 in words."""
    if number == 100:
        return "one hundred"
    if number < 20:
        return UNITS[number]
    return TENS[number // 10] + (" " + UNITS[number % 10] if number % 10 else "")


class Draw(random.Random):
    """The seeded source of every choice in the corpus."""

    def pick(self, options: Sequence[str]) -> str:
        """Return one option; all are equally likely."""
        return options[int(self.random() * len(options))]

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self.random() < probability

    def made_up_word(self) -> str:
        """Return a pronounceable word of one to three syllables that is not a held-out name."""
        while True:
            syllables = []
            for index in range(self.randint(1, 3)):
                onset = self.pick(CONSONANTS) if index or self.chance(0.7) else ""
                final = self.pick(FINALS) if self.chance(0.4) else ""
                syllables.append(onset + self.pick(VOWELS) + final)
            word = "".join(syllables)
            if len(word) > 2 and word.capitalize() not in HELD_NAMES:
                return word

    def person(self, made_up: float = 0.6) -> str:
        """Return a first name, made up with the given probability."""
        return self.made_up_word().capitalize() if self.chance(made_up) else self.pick(CONTACTS)
