"""Classification by examples alone: items of four kinds, named by made-up labels, so that the
answer is in the prompt and nowhere else."""

import random

from benchmarks.quality.sample import Sample, Task, Writer

_KINDS = (
    (
        "cat",
        "dog",
        "horse",
        "cow",
        "sheep",
        "goat",
        "lion",
        "tiger",
        "bear",
        "wolf",
        "fox",
        "deer",
        "mouse",
        "rabbit",
        "monkey",
        "elephant",
        "camel",
        "donkey",
        "pig",
        "squirrel",
    ),
    (
        "bread",
        "cheese",
        "apple",
        "banana",
        "rice",
        "soup",
        "butter",
        "cake",
        "salad",
        "pasta",
        "orange",
        "egg",
        "honey",
        "potato",
        "tomato",
        "onion",
        "carrot",
        "pizza",
        "cherry",
        "grape",
    ),
    (
        "car",
        "bus",
        "train",
        "truck",
        "bicycle",
        "airplane",
        "boat",
        "ship",
        "tram",
        "taxi",
        "van",
        "motorcycle",
        "helicopter",
        "scooter",
        "ferry",
        "wagon",
        "tractor",
        "ambulance",
        "canoe",
        "submarine",
    ),
    (
        "shirt",
        "jacket",
        "trousers",
        "shoes",
        "hat",
        "scarf",
        "gloves",
        "socks",
        "dress",
        "skirt",
        "coat",
        "boots",
        "belt",
        "sweater",
        "tie",
        "vest",
        "sandals",
        "cap",
        "jeans",
        "pajamas",
    ),
)
_LABELS = ("red", "blue", "green", "white")


def _make(random: random.Random, writer: Writer, num_tokens: int) -> Sample:
    labels = random.sample(_LABELS, len(_KINDS))
    kind = random.randrange(len(_KINDS))
    asked = random.choice(_KINDS[kind])
    items = [
        (item, label) for items, label in zip(_KINDS, labels) for item in items if item != asked
    ]
    question = f"Item: {asked}\nLabel:"

    def example() -> str:
        item, label = random.choice(items)
        return f"Item: {item}\nLabel: {label}\n\n"

    parts = writer.fill(example, num_tokens - writer.count(question))
    return Sample(writer.plain("".join(parts) + question), [labels[kind]])


TASKS = (Task("few-shot classification", _make, "first_word", 3),)
