"""Logistic regression: the optimum by its gradient, what features and lists go in, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.confusions import assert_confusions_fit, read_confusions, slow_cells
from helpers.runs import run_script
from helpers.small_networks import SMALL
from helpers.token_runs import NETWORK, QUICK, TWO, features, last_tokens, make_folder, run
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import eval_logistic
from config.arguments.eval_logistic import POOLED
from eval_logistic import solve
from evaluation.confusion import confusion_cells
from evaluation.features import LabeledFeatures
from models import Backbone
from utils import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tokens"))


def clusters(images: int, classes: int, seed: int) -> LabeledFeatures:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(images) % classes
    return LabeledFeatures(F.normalize(centers[labels] + torch.randn(images, 6, generator=generator), dim=1), labels)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(("lambd", "adjust"), [(0.01, False), (0.5, True)])
def test_optimum_of_the_objective(classes: int, lambd: float, adjust: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of mean cross-entropy + lambda / 2 * squared norm vanishes, and accuracies are those of its logits."""
    train, val = clusters(60, classes, 1), clusters(40, classes, 2)
    fitted: list[LogisticRegression] = []
    fit = LogisticRegression.fit

    def remember(self: LogisticRegression, x: object, y: object) -> LogisticRegression:
        fitted.append(self)
        return fit(self, x, y)

    monkeypatch.setattr(LogisticRegression, "fit", remember)
    score = solve(train, val, lambd, adjust, 1000)
    rows = torch.from_numpy(fitted[0].coef_)
    weights = rows if classes > 2 else torch.cat([-rows, rows]) / 2  # two classes have the difference of two rows
    weights = weights.double().requires_grad_()
    penalty = lambd / len(train.labels_N) if adjust else lambd
    logits = train.features_NC.double() @ weights.T
    objective = F.cross_entropy(logits, train.labels_N) + penalty / 2 * weights.square().sum()
    (gradient,) = torch.autograd.grad(objective, weights)
    assert gradient.abs().max() < 2 * eval_logistic.TOLERANCE
    ranking = (val.features_NC.double() @ weights.T).argsort(dim=1, descending=True)
    hits = ranking[:, :5] == val.labels_N[:, None]
    assert score.top1 == pytest.approx(100 * hits[:, 0].double().mean().item())
    assert score.top5 == pytest.approx(100 * hits.any(dim=1).double().mean().item())
    assert torch.equal(score.confusion_P3, slow_cells(val.labels_N, ranking[:, 0]))
    assert score.converged
    assert score.top1 > 100 / classes


def test_convergence_flag_and_sparse_labels() -> None:
    train, val = clusters(60, 4, 1), clusters(40, 4, 2)
    assert not solve(train, val, 1e-6, True, 1).converged
    spread = (train._replace(labels_N=3 * train.labels_N + 2), val._replace(labels_N=3 * val.labels_N + 2))
    sparse, dense = solve(*spread, 0.1, True, 500), solve(train, val, 0.1, True, 500)
    assert sparse[:3] == dense[:3]
    assert torch.equal(sparse.confusion_P3, dense.confusion_P3 * torch.tensor([3, 3, 1]) + torch.tensor([2, 2, 0]))


@pytest.mark.parametrize("pooled", [0, 1, 2])
def test_pooled_features(pooled: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, the mean of the patches after both class tokens, or both; scaled to length 1."""
    seen: list[LabeledFeatures] = []

    def remember(train: LabeledFeatures, val: LabeledFeatures, lambd: float, *_: object) -> eval_logistic.Score:
        seen.append(train)
        return eval_logistic.Score(lambd, 50.0, 100.0, 3, False, confusion_cells(val.labels_N, val.labels_N))

    monkeypatch.setattr(eval_logistic, "solve", remember)
    listed = tmp_path / "list.txt"
    listed.write_text("class0/001.png\nclass2/003.png\n")
    flags = ["--avgpool_patchtokens", str(pooled), "--token", "cls+", "--target_list_path", str(listed)]
    results = run(eval_logistic, folder, tmp_path / "out", *flags)

    def expected(backbone: Backbone, images: Tensor) -> Tensor:
        tokens = last_tokens(backbone, images)
        parts = [tokens[:, 1], tokens[:, 2:].mean(dim=1)]
        return F.normalize(torch.cat([parts[:1], parts[1:], parts][pooled], dim=1), dim=1)

    torch.testing.assert_close(seen[0].features_NC, features(folder, "train", expected)[[1, 11]])
    assert seen[0].labels_N.tolist() == [0, 2]
    assert len(seen) == 3
    assert results["protocol"]["features"] == POOLED[pooled]
    assert {"train_images": 2, "val_images": 6, "classes": 3}.items() <= results["data"].items()
    assert [row["converged"] for row in results["scores"].values()] == [False] * 3
    assert results["protocol"]["top5_is"] == "top3"


@pytest.mark.slow
def test_two_processes_score_as_one(folder: Path, tmp_path: Path) -> None:
    command = [*NETWORK, *QUICK, "--data_path", str(folder / "images"), "--lr_lambd", "0.1", "1"]
    command += ["--pretrained_weights", str(folder / "checkpoint.pth")]
    found = []
    for processes in (0, 2):
        out = tmp_path / str(processes)
        tail = ["--output_dir", str(out), "--seed", "0", *SMALL["vit"].overrides, *TWO]
        done = run_script("eval_logistic.py", *command, *tail, processes=processes)
        assert done.returncode == 0, done.stderr
        found.append((assert_confusions_fit(out, "logistic"), read_confusions(out, "logistic")))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--n_last_blocks", "4"], "--n_last_blocks 4 must be in 1..3"),
        (["--target_list_path", "nowhere.txt"], r"nowhere.txt cannot be read \(No such file"),
    ],
)
def test_mistakes(flags: list[str], words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        run(eval_logistic, folder, tmp_path, *flags)


def test_one_class_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("class0/001.png\n")
    with pytest.raises(UsageError, match="one class"):
        run(eval_logistic, folder, tmp_path / "out", "--target_list_path", str(tmp_path / "list.txt"))
