"""Precision: measured, held to the fp32 embedding, recorded, and replayed exactly."""

import logging

import numpy as np
import pytest
import torch
from tiny import tiny_encoder
from torch import nn

import featcache.precision
from featcache.precision import CANDIDATES, FAITHFUL, FP32, choose_precision


class Cancelling(nn.Module):
    """Exact in fp32; in bf16 every digit of the embedding cancels away."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return {"embedding": (self.module(images)["embedding"] + 4096) - 4096}


@pytest.fixture
def pixels(rng):
    return torch.from_numpy(rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def unfaithful():
    encoder = tiny_encoder()
    encoder.module = Cancelling(encoder.module)
    encoder.fields = {"embedding": (6,)}
    return encoder


def weights_of(encoder):
    return {key: value.clone() for key, value in encoder.module.state_dict().items()}


def test_an_unfaithful_precision_is_not_used_and_said(unfaithful, pixels, caplog):
    before, expected = weights_of(unfaithful), unfaithful.encode(pixels)["embedding"]
    with caplog.at_level(logging.WARNING, "featcache"):
        record, _ = choose_precision(unfaithful, pixels, "bf16", "cpu")
    assert record == {"precision": "fp32", "cosine": 1.0}
    assert unfaithful.precision == FP32
    assert [message.split(" (")[0] for message in caplog.messages] == [
        "tiny: bf16+channels_last is fast but unfaithful",
        "tiny: bf16-autocast+channels_last is fast but unfaithful",
    ]
    after = unfaithful.module.state_dict()
    assert all(after[key].dtype == torch.float32 and torch.equal(after[key], before[key]) for key in before)
    torch.testing.assert_close(unfaithful.encode(pixels)["embedding"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("requested", ["auto", "fp32", "bf16", "fp16"])
def test_the_record_holds_the_cosine_to_fp32(pixels, requested):
    encoder, reference = tiny_encoder(), tiny_encoder()
    record, _ = choose_precision(encoder, pixels, requested, "cpu")
    assert requested == "auto" or record["precision"].startswith(requested)
    assert CANDIDATES[record["precision"]] == encoder.precision
    a, b = encoder.encode(pixels)["embedding"].numpy(), reference.encode(pixels)["embedding"].numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert FAITHFUL <= record["cosine"] == pytest.approx(cosine.min(), abs=2e-6)


@pytest.mark.parametrize("requested", ["bf16", "fp16"])
def test_lower_precision_weights_are_rounded_from_fp32_once(pixels, requested):
    encoder, original = tiny_encoder(), tiny_encoder().module.state_dict()
    choose_precision(encoder, pixels, requested, "cpu")
    for key, value in encoder.module.state_dict().items():
        assert torch.equal(value, original[key].to(encoder.precision.weights))
    assert encoder.fingerprint == tiny_encoder().fingerprint


def test_an_unknown_precision_is_refused(encoder, pixels):
    with pytest.raises(ValueError, match="unknown precision 'int8'; known: auto, fp32, bf16, fp16"):
        choose_precision(encoder, pixels, "int8", "cpu")


def test_names_are_distinct_and_lead_back():
    assert len(CANDIDATES) == 5
    assert all(precision.name == name for name, precision in CANDIDATES.items())


@pytest.mark.parametrize("fast", CANDIDATES)
def test_a_recorded_precision_is_replayed_whatever_the_clock_says(pixels, monkeypatch, fast):
    """Resuming asks for the recorded name: the finished chunks were made with exactly that."""

    def seconds(encoder, pixels):
        return 1.0 if encoder.precision == CANDIDATES[fast] else 2.0

    monkeypatch.setattr(featcache.precision, "_seconds", seconds)
    for name in CANDIDATES:
        encoder = tiny_encoder()
        assert choose_precision(encoder, pixels, name, "cpu", recorded=True)[0]["precision"] == name
        assert encoder.precision == CANDIDATES[name]
