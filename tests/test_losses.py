"""The terms of the replay loss as functions of tensors, each against a slow obvious reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import VOCABULARY, tiny_llama
from torch import Tensor

from seekr_peft.losses import answer_entropy, combine, label_loss, logits_kl
from seekr_peft.model.answers import answer_logits, answer_positions, evaluation_mode
from seekr_peft.sparse import SparseDistribution
from seekr_peft.tasks.tokenize import IGNORED_LABEL as NO

N_ANSWER, WORDS = 5, 13


def random_logits(seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(N_ANSWER, WORDS, generator=generator)).to(dtype)


def largest(logits: Tensor, k: int) -> SparseDistribution:
    """The ``k`` largest entries of each position by itself."""
    rows = [SparseDistribution.from_logits(row[None], k) for row in logits]
    return SparseDistribution(*(torch.cat([vars(row)[part] for row in rows]) for part in vars(rows[0])))


def slow_merged_kl(student: Tensor, teacher: Tensor, k: int) -> float:
    """Mean over positions of the KL between (the teacher's k largest entries, all the others as one bin)."""
    total = 0.0
    for p, q in zip(teacher.softmax(-1).tolist(), student.softmax(-1).tolist(), strict=True):
        order = sorted(range(len(p)), key=lambda token: -p[token])
        pairs = [(p[token], q[token]) for token in order[:k]]
        if k < len(p):
            pairs.append((sum(p[token] for token in order[k:]), sum(q[token] for token in order[k:])))
        total += sum(a * math.log(a / b) for a, b in pairs)
    return total / len(teacher)


def test_answers_are_predicted_one_position_before_they_stand_and_the_first_one_is_not_lost() -> None:
    labels = torch.tensor([[NO, NO, 7, 8, NO], [NO, 5, NO, NO, 6]])
    sample, position, target = answer_positions(labels)
    assert sample.tolist() == [0, 0, 1, 1]
    assert position.tolist() == [1, 2, 0, 3]
    assert target.tolist() == [7, 8, 5, 6]


def test_a_label_on_the_very_first_token_is_predicted_by_nothing() -> None:
    sample, position, target = answer_positions(torch.tensor([[9, NO, 3]]))
    assert (sample.tolist(), position.tolist(), target.tolist()) == ([0], [1], [3])


def labelled_batch() -> dict[str, Tensor]:
    """Three right-padded samples with answers of 3, 1 and 2 tokens."""
    generator = torch.Generator().manual_seed(4)
    input_ids = torch.randint(1, VOCABULARY, (3, 11), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 8:] = attention_mask[2, 10:] = 0
    labels = torch.full_like(input_ids, NO)
    for row, answer in ((0, slice(8, 11)), (1, slice(7, 8)), (2, slice(2, 4))):
        labels[row, answer] = input_ids[row, answer]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@torch.no_grad()
def test_the_label_loss_is_the_one_that_transformers_returns() -> None:
    model, batch = tiny_llama(), labelled_batch()
    expected = model(**batch).loss
    logits, targets = answer_logits(model, **batch)
    assert expected > 1
    assert logits.shape == (6, VOCABULARY)
    torch.testing.assert_close(label_loss(logits, targets), expected, rtol=1e-6, atol=0)


@torch.no_grad()
def test_answer_logits_are_those_of_a_full_forward_in_order_of_sample_and_position() -> None:
    model, batch = tiny_llama(), labelled_batch()
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.stack([full[i, j] for i, j in ((0, 7), (0, 8), (0, 9), (1, 6), (2, 1), (2, 2))])
    logits, targets = answer_logits(model, **batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert targets.tolist() == [
        int(batch["input_ids"][i, j]) for i, j in ((0, 8), (0, 9), (0, 10), (1, 7), (2, 2), (2, 3))
    ]


@torch.no_grad()
def test_answer_logits_need_no_logits_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(), labelled_batch()
    kept, _ = answer_logits(model, **batch)
    monkeypatch.setattr("seekr_peft.model.facts.ModelFacts.keeps_logits", property(lambda facts: False))
    whole, _ = answer_logits(model, **batch)
    torch.testing.assert_close(kept, whole, rtol=1e-5, atol=1e-5)


def test_evaluation_mode_restores_each_modules_own_mode_even_after_an_exception() -> None:
    model = tiny_llama().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="boom"), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("boom")
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_a_dense_kl_is_torchs_batchmean_kl_div() -> None:
    student, teacher = random_logits(1), random_logits(2)
    expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    loss = logits_kl(student, SparseDistribution.from_logits(teacher, WORDS))
    assert expected > 0.5
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_a_kl_of_two_words_by_hand() -> None:
    # Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2).
    teacher = SparseDistribution.from_logits(torch.tensor([[math.log(3.0), 0.0]]), 2)
    assert float(logits_kl(torch.zeros(1, 2), teacher)) == pytest.approx(0.1308120324, abs=1e-7)


@pytest.mark.parametrize("k", [1, 2, 5, WORDS - 1, WORDS, WORDS + 9])
def test_the_kl_with_a_remaining_mass_is_that_of_merged_bins(k: int) -> None:
    student, teacher = random_logits(3), random_logits(4)
    loss = logits_kl(student, largest(teacher, k))
    assert float(loss) == pytest.approx(slow_merged_kl(student, teacher, k), rel=1e-10)


@given(st.integers(1, WORDS), st.integers(0, 10**6))
def test_fewer_entries_never_give_a_larger_kl_and_never_a_negative_one(k: int, seed: int) -> None:
    student, teacher = random_logits(seed), random_logits(seed + 1)
    losses = [float(logits_kl(student, largest(teacher, n))) for n in (k, WORDS)]
    assert 0 <= losses[0] <= losses[1] + 1e-12


@pytest.mark.parametrize("k", [1, 4, WORDS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_identical_distributions_have_no_loss_and_no_gradient(k: int, dtype: torch.dtype) -> None:
    student = random_logits(5, dtype=dtype).requires_grad_()
    loss = logits_kl(student, largest(student.detach(), k))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("k", [1, 4, WORDS])
def test_the_gradient_is_right(k: int) -> None:
    teacher = largest(random_logits(6), k)
    student = random_logits(7).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: logits_kl(logits, teacher), (student,))
    logits_kl(student, teacher).backward()
    assert float(student.grad.abs().max()) > 0.01


def test_the_teacher_gets_no_gradient() -> None:
    logits = random_logits(8).requires_grad_()
    teacher = largest(logits.detach(), 3)
    assert not any(part.requires_grad for part in (teacher.probabilities, teacher.remaining))


def test_an_absent_entry_changes_neither_value_nor_gradient_whatever_token_it_names() -> None:
    teacher = largest(random_logits(9), 3)
    names_0 = ((teacher.indices == 0) & (teacher.probabilities > 0)).any(dim=-1)
    assert not names_0.all(), "some position must have token 0 among the others"
    padded = SparseDistribution(F.pad(teacher.indices, (0, 2)), F.pad(teacher.probabilities, (0, 2)), teacher.remaining)
    results = []
    for target in (teacher, padded):
        student = random_logits(10).requires_grad_()
        loss = logits_kl(student, target)
        loss.backward()
        results.append((loss.detach(), student.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-15)


def test_a_covered_position_beside_one_with_a_remaining_mass_gives_no_nan() -> None:
    # Position 0 stores every word and has no rest; position 1 stores one word of three.
    teacher = SparseDistribution(
        torch.tensor([[0, 1, 2], [1, 0, 0]]),
        torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.0, 0.0]]),
        torch.tensor([0.0, 0.4]),
    )
    student = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = logits_kl(student, teacher)
    loss.backward()
    q = [math.exp(i) / (1 + math.e + math.e**2) for i in range(3)]
    first = sum(p * math.log(p / s) for p, s in zip((0.2, 0.3, 0.5), q, strict=True))
    second = 0.6 * math.log(0.6 * 3) + 0.4 * math.log(0.4 / (2 / 3))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-5)
    assert torch.isfinite(student.grad).all()


def test_top_k_keeps_the_largest_entries_and_the_mass_of_the_others() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).log()  # probabilities 1/6, 3/6, 2/6, 0
    kept = SparseDistribution.from_logits(logits, 2)
    present = kept.probabilities > 0
    assert kept.indices[present].tolist() == [1, 2]
    torch.testing.assert_close(kept.probabilities[present], torch.tensor([1 / 2, 1 / 3]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(kept.remaining, torch.tensor([1 / 6]).double(), rtol=1e-6, atol=0)
    assert SparseDistribution.from_logits(logits, 4).remaining.tolist() == [0.0]


def test_a_sure_position_leaves_its_entries_to_an_unsure_one() -> None:
    sure, unsure = [0.97, 0.01, 0.01, 0.01], [0.4, 0.3, 0.2, 0.1]
    logits = torch.tensor([sure, unsure]).double().log()
    kept = SparseDistribution.from_logits(logits, 2)
    assert (kept.probabilities > 0).sum(dim=-1).tolist() == [1, 3]
    torch.testing.assert_close(kept.remaining, torch.tensor([0.03, 0.1]).double(), rtol=1e-6, atol=0)


def test_no_more_entries_are_kept_than_hold_the_mass() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.06, 0.03, 0.01], [0.2, 0.2, 0.2, 0.2, 0.2]]).double().log()
    kept = SparseDistribution.from_logits(logits, 4, kept_mass=0.9)
    assert (kept.probabilities > 0).sum(dim=-1).tolist() == [2, 5]
    torch.testing.assert_close(kept.remaining, torch.tensor([0.1, 0.0]).double(), rtol=1e-6, atol=1e-12)


@given(st.integers(1, WORDS - 1), st.floats(0.3, 1.0), st.integers(0, 10**6))
def test_the_entries_kept_are_within_the_budget_and_account_for_all_mass(k: int, mass: float, seed: int) -> None:
    logits = random_logits(seed, scale=4.0)
    kept = SparseDistribution.from_logits(logits, k, mass)
    present = kept.probabilities > 0
    assert int(present.sum()) <= k * N_ANSWER
    torch.testing.assert_close(kept.probabilities.sum(-1) + kept.remaining, torch.ones(N_ANSWER).double())
    exact = logits.softmax(-1).gather(-1, kept.indices)
    torch.testing.assert_close(kept.probabilities, torch.where(present, exact, 0))
    if int(present.sum()) < k * N_ANSWER and 4 * k >= WORDS:
        assert (kept.remaining <= 1 - mass + 1e-12).all(), "entries were left out that the budget had room for"


def test_the_terms_are_combined_by_hand() -> None:
    replay, logits, attention = torch.tensor(2.0), torch.tensor(10.0), torch.tensor(0.5)
    terms = combine(replay, logits, attention, lambda1=0.25, lambda2=4.0)
    assert float(terms.total) == 0.25 * 2 + 0.75 * 10 + 4 * 0.5
    assert {name: float(value) for name, value in terms.values().items()} == {
        "replay_loss": 2.0,
        "logits_loss": 10.0,
        "attention_loss": 0.5,
    }


def test_without_logits_the_labels_weigh_one_and_absent_terms_have_no_name() -> None:
    terms = combine(torch.tensor(2.0), None, torch.tensor(0.5), lambda1=0.25, lambda2=4.0)
    assert float(terms.total) == 2 + 4 * 0.5
    assert set(terms.values()) == {"replay_loss", "attention_loss"}
    alone = combine(torch.tensor(2.0), None, None, 0.25, 4.0)
    assert float(alone.total) == 2.0 and set(alone.values()) == {"replay_loss"}


def test_the_entropy_of_a_coin_a_certainty_and_a_uniform_word_in_nats() -> None:
    coin = torch.tensor([[0.0, 0.0, -1e4, -1e4], [0.0, -1e4, -1e4, -1e4], [5.0, 5.0, 5.0, 5.0]])
    expected = torch.tensor([math.log(2), 0.0, math.log(4)])
    torch.testing.assert_close(answer_entropy(coin), expected, rtol=1e-6, atol=1e-6)
