"""What needs other people's packages, in the environment of peers: python cascade_peers.py WHAT QUESTION ANSWER.

Started by benchmarks/cascade.py; imports nothing of ours. The files are JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

#: Of a licence so much is read: the categories show early, and whole texts take minutes.
CHARACTERS = 3_000


def bargain(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """BARGAIN_A over each cell: its share of calls to Pro, and how often it left more wrong than it may."""
    return [_bargain_cell(cell) for cell in cells]


def _bargain_cell(cell: dict[str, Any]) -> dict[str, Any]:
    from BARGAIN import BARGAIN_A

    sure, agrees = np.array(cell["confidence"]), np.array(cell["agrees"])
    proxy, oracle = _tiers(sure, agrees)
    shares, broken = [], 0
    for trial in range(cell["trials"]):
        chooser = BARGAIN_A(proxy, oracle, cell["target"], cell["delta"], verbose=False, seed=trial)
        _, asked = chooser.process(np.arange(len(sure)), return_oracle_usage=True)
        kept = ~np.array(asked)
        shares.append(1 - kept.mean())
        # 1e-9: the target is a float here, and a whole number of documents that it allows is allowed.
        broken += bool((kept & ~agrees).sum() > (1 - cell["target"]) * len(sure) + 1e-9)
    return {"share": round(float(np.mean(shares)), 4), "broken": broken, "trials": cell["trials"]}


def _tiers(sure: Any, agrees: Any) -> tuple[Any, Any]:
    """Its two models, which look everything up at once: its own start a thread for each document."""
    from BARGAIN import Oracle, Proxy

    class Flash(Proxy):
        def get_preds_and_scores(self, indxs: Any, data_records: Any) -> Any:
            numbers = np.asarray(indxs, dtype=int)
            return np.zeros(len(numbers), dtype=int), sure[numbers]

    class Pro(Oracle):
        def is_answer_correct(self, data_indxs: Any, data_records: Any, proxy_output_at_indxs: Any) -> Any:
            return agrees[np.asarray(data_indxs, dtype=int)]

        def get_pred(self, data_records: Any, indxs: Any = None) -> Any:
            return np.ones(len(data_records), dtype=int)

    return Flash(), Pro()


def licences(texts: list[dict[str, str]]) -> dict[str, Any]:
    """Words by naive Bayes as the cheap tier, character n-grams by logistic regression as the dear one.

    Each text is answered by models that were fitted without it. Categories of fewer than ten texts are left out.
    """
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    common = Counter(one["category"] for one in texts)
    kept = [one for one in texts if common[one["category"]] >= 10]
    bodies, labels = [one["text"][:CHARACTERS] for one in kept], np.array([one["category"] for one in kept])
    folds = StratifiedKFold(3, shuffle=True, random_state=6)
    cheap = make_pipeline(CountVectorizer(max_features=5_000), MultinomialNB())
    dear = make_pipeline(
        TfidfVectorizer(analyzer="char", ngram_range=(2, 4), max_features=20_000, sublinear_tf=True),
        LogisticRegression(C=20, max_iter=100),
    )
    posterior = cross_val_predict(cheap, bodies, labels, cv=folds, method="predict_proba")
    flash = np.unique(labels)[posterior.argmax(axis=1)]
    pro = cross_val_predict(dear, bodies, labels, cv=folds)
    print(
        f"licences: Bayes right {(flash == labels).mean():.3f}, regression {(pro == labels).mean():.3f}",
        file=sys.stderr,
    )
    return {"sure": posterior.max(axis=1).tolist(), "agrees": (flash == pro).tolist()}


if __name__ == "__main__":
    what, question, answer = sys.argv[1:]
    found = {"bargain": bargain, "licences": licences}[what](json.loads(Path(question).read_text()))
    Path(answer).write_text(json.dumps(found))
