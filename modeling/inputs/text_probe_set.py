"""Texts to compare engines on before anybody's own are at hand: sentences of eight topics, joined to texts of one
sentence to some two hundred words."""

from __future__ import annotations

import random

_TOPICS: dict[str, tuple[str, ...]] = {
    "earnings": (
        "The company reported a net profit of 4.2 mln dlrs for the quarter, up from 3.1 mln a year earlier.",
        "Revenue fell 6 pct as orders from two large customers were put off until the spring.",
        "The board raised the quarterly dividend to 18 cents a share, payable on May 1.",
        "Analysts had expected earnings of 55 cents a share; the shares closed down three percent.",
        "Results include a one-time gain of 900,000 dlrs from the sale of a warehouse.",
        "Management kept its forecast for the full year but warned about currency effects.",
        "Operating margins narrowed because wages and freight rose faster than prices.",
        "The loss per share was 12 cents, against a profit of 30 cents in the year before.",
    ),
    "commodities": (
        "Wheat exports may reach 28 mln tonnes this season if the rain holds off until harvest.",
        "Crude oil traded near 71 dollars a barrel after inventories fell for a third week.",
        "Farmers sold little corn, hoping that prices would recover before the next report.",
        "Copper stocks in exchange warehouses dropped to their lowest level since winter.",
        "The cooperative shipped 40,000 bags of coffee through the northern port last month.",
        "Soybean crushers bought heavily while freight rates along the river stayed low.",
        "A frost in the highlands has damaged a tenth of the crop, growers say.",
        "Sugar futures slipped on talk that the export quota will be raised.",
    ),
    "praise": (
        "A warm and funny film that never talks down to its audience.",
        "The two leads are wonderful together, and the last scene is worth the ticket alone.",
        "I have used this kettle every day for a year and it still looks like new.",
        "Setup took five minutes and everything simply worked.",
        "The staff went out of their way to help us, and the room was spotless.",
        "Beautifully shot, cleverly written, and over before you want it to be.",
        "Battery life is far better than I expected at this price.",
        "We laughed until it hurt; my parents loved it as much as the kids did.",
    ),
    "complaint": (
        "The plot makes no sense and the jokes fall flat from the first minute.",
        "It broke after two weeks and nobody answers my messages about a refund.",
        "Two hours of shouting, with an ending that you can see coming from the trailer.",
        "The zipper jammed on the first day; what a waste of money.",
        "Cold food, rude service, and a bill with things that we never ordered.",
        "The picture is grainy, the sound is worse, and the remote is useless.",
        "I wanted to like it, but the dialogue is clumsy and the pace is deadly.",
        "Do not buy this: the instructions are wrong and half of the screws were missing.",
    ),
    "support": (
        "I can't log in since yesterday; the page says that my session has expired.",
        "How do I change the e-mail address on my account without losing my orders?",
        "The app crashes as soon as I open the settings on my phone.",
        "Please cancel my subscription and confirm that I will not be charged again.",
        "My parcel is marked as delivered, but nothing has arrived at our office.",
        "The invoice shows the wrong VAT number; can you send a corrected one?",
        "After the update the export to CSV gives an empty file.",
        "Two-factor codes arrive ten minutes late, so I am locked out again.",
    ),
    "science": (
        "The telescope measured the light of a galaxy that formed soon after the first stars.",
        "Cells were grown for six days at 37 degrees and then stained for the protein.",
        "We propose a method that halves the number of samples needed for the same error.",
        "Warmer water holds less oxygen, which drives the fish into deeper layers.",
        "The proof uses induction on the number of vertices of the graph.",
        "A trial with 312 patients found no difference between the two doses.",
        "Sediment cores show that the lake dried out twice in four thousand years.",
        "The new alloy keeps its strength up to 900 kelvin, the authors report.",
    ),
    "sport": (
        "The home side scored twice in the last ten minutes and took the cup.",
        "She won the second set on a tie-break after saving four match points.",
        "The coach left out his captain and switched to three at the back.",
        "A photo finish separated the first three riders at the top of the climb.",
        "Rain stopped play for two hours with the visitors on 184 for 6.",
        "The rookie threw for 310 yards and ran for another touchdown.",
        "They lost four games in a row before the new keeper arrived.",
        "The relay team broke the national record by almost half a second.",
    ),
    "software": (
        "def mean(values): return sum(values) / len(values)  # fails for an empty list",
        "The build fails with exit code 137 because the container runs out of memory.",
        "Use an index on created_at; the query scans the whole table otherwise.",
        "Version 2.4 drops support for Python 3.9 and fixes a race in the scheduler.",
        'The endpoint answers {"status": "ok", "items": []} even when the id is unknown.',
        "Set the timeout to 30 s and retry with exponential back-off.",
        "git rebase rewrote the commits, so the tags point to nothing now.",
        "The service leaks file handles: lsof shows 12,000 open sockets after a day.",
    ),
}
TEXTS = 512


def texts(count: int = TEXTS, *, seed: int = 7) -> tuple[list[str], list[int]]:
    """`count` texts with the number of each one's topic, the same at every call. Half are short."""
    draw = random.Random(seed)
    sentences = list(_TOPICS.values())
    made, topics = [], []
    for _ in range(count):
        topic = draw.randrange(len(sentences))
        length = draw.randint(1, 2) if draw.random() < 0.5 else draw.randint(3, 12)
        made.append(" ".join(draw.choice(sentences[topic]) for _ in range(length)))
        topics.append(topic)
    return made, topics
