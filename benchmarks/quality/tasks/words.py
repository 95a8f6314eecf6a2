"""Words to make samples of: real ones, made-up ones, numbers and ids."""

import random
import uuid

ADJECTIVES = """
able amber ancient azure bitter blank bold brave brief bright broad broken calm careful cheap clean
clear clever cold cool crisp cruel curly damp dark deep dense dim dry dull dusty eager early easy
empty exact faint fair false fancy fast fierce final fine firm flat fresh gentle giant glad golden
grand gray great happy hard harsh heavy hidden high hollow honest huge humble idle jolly keen large
late lazy light little lively lone long loud loyal lucky major merry mild minor modern narrow neat
noble noisy odd old open pale patient plain polite proud pure quick quiet rapid rare rich ripe rough
round royal rusty sad safe salty sharp short shy silent silver simple slim slow small smooth soft
solid sour spare steady steep still strange strict strong sweet swift tall tame tender thick thin
tidy tiny tired vague vast warm wet wide wild wise young
""".split()

NOUNS = """
acorn actor anchor angel ankle apple apron arch arm arrow artist atlas attic aunt autumn axle badge
baker ball balcony bamboo banner barn barrel basin basket beach beacon beam bean beard beetle bell
belt bench berry bicycle bird blanket blossom boat bone book boot border bottle bowl box branch
brass bread brick bridge broom brother brush bucket bullet butter button cabin cable cactus cage
cake camel camera canal candle canoe canvas cape captain card carpet carrot castle cattle cave
ceiling cellar chain chair chalk cherry chest chicken chimney circle circus city clock cloth cloud
clover coach coast coat coffee coin collar comet compass copper coral corn corner cotton couch
cousin cradle crane crayon cream creek cricket crown crystal cup curtain cushion dancer desert desk
diamond diary dinner doctor dollar dolphin donkey door dragon drawer dream dress drum duck eagle ear
echo elbow elephant engine envelope eye fabric factory falcon farm farmer father feather fence ferry
fiddle field finger fire fish flag flame flood floor flour flower flute forest fork fountain fox
frame frog fruit funnel gallery garden garlic gate ginger giraffe glacier glass glove goat goose
grape grass guitar hammer harbor harp hat hawk hedge helmet herb heron hill honey hook horn horse
hotel house iceberg insect island ivory jacket jaguar jar jewel judge jungle kettle key kitchen kite
kitten knee knife ladder lake lamp lantern lawyer leaf leather lemon letter library lion lizard
lobster lock locket lunch magnet mango map maple marble market mask meadow medal melon metal mirror
mitten monkey moon mother motor mountain mouse museum mushroom napkin necklace needle nest nurse oak
ocean office olive onion orange orchard organ otter oven owl oyster paddle page painter palace panda
paper parade park parrot path peach pearl pebble pencil pepper piano pillow pilot pine pipe pirate
planet plate plum pocket poem pony potato prince pump puppet puzzle quarry queen quilt rabbit radio
raft rail rain raven ribbon rice ring river road robin rocket roof root rope rose ruby saddle sail
salmon sand sandal scarf school scissors seal seed shadow shark sheep shelf shell ship shirt shoe
shovel silk singer sister skirt sled snail snow sock soldier soup spider spoon spring squirrel stage
stair star station statue stone stool storm stove stream street sugar summer sun swan table tailor
tapestry teacher temple tent thread throne thunder ticket tiger timber toast tomato tower toy
tractor train trumpet tulip tunnel turtle umbrella uncle valley vase velvet village vine violin
wagon wallet walnut water wave whale wheat wheel whistle window wing winter wizard wolf wood wool
wrist yacht yard zebra
""".split()

PEOPLE = "Anna David Elena Frank Henry Irene Louis Maria Oscar Paula Robert Thomas".split()
CITIES = "Athens Berlin Cairo Dublin Geneva Lisbon Madrid Moscow Oslo Prague Tokyo Vienna".split()

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def words(random: random.Random, count: int) -> list[str]:
    """So many different words in random order: single ones as long as there are, then joined."""
    pool = ADJECTIVES + NOUNS
    if count > len(pool):
        joined = random.sample(range(len(NOUNS) ** 2), count - len(pool))
        pool = pool + [NOUNS[i // len(NOUNS)] + NOUNS[i % len(NOUNS)] for i in joined]
    return random.sample(pool, count)


def names(random: random.Random, count: int) -> list[str]:
    """So many different names, an adjective and a noun each. Raises ValueError if there are not so
    many: about 60,000."""
    chosen = random.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in chosen]


def made_up(random: random.Random, count: int, syllables: int) -> list[str]:
    """So many different words that mean nothing."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice(s) for s in (_CONSONANTS, _VOWELS) * syllables)] = None
    return list(found)


def coded(random: random.Random, count: int, letters: str, length: int) -> list[str]:
    """So many different strings of these letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choices(letters, k=length))] = None
    return list(found)


def uuids(random: random.Random, count: int) -> list[str]:
    return [str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in range(count)]


def shuffled(items: list[str], seed: float) -> list[str]:
    """In an order that is the same for as many items and this seed."""
    return random.Random(seed).sample(items, len(items))
