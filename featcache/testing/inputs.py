"""What every kind of input must be."""

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.inputs import AUGMENTS, Input, Views, input_of
from featcache.plugins import load_plugin


class InputContract:
    """Of the input `name`: of `example`, one of them, with a sample `encoded` for it (an image, where it is not overridden)."""

    name: str
    example: Input[Any, Any]

    @pytest.fixture
    def encoded(self) -> bytes:
        """A picture; override it for samples that are none."""
        file = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    def test_its_record_makes_it_again(self) -> None:
        record = json.loads(json.dumps(self.example.to_dict()))
        plugin = load_plugin("featcache.inputs", self.name)
        assert input_of(record) == self.example == plugin.open_input(record)
        assert hash(self.example) == hash(input_of(record))
        assert record.get("input", "images") == self.name
        assert isinstance(self.example, Input)
        assert set(self.example.augments) <= set(AUGMENTS)

    def test_a_view_is_a_function_of_its_arguments(self, encoded: bytes) -> None:
        item = self.example.decode(encoded)
        size = self.example.size_of(item)
        for augment in self.example.augments:
            views = Views(count=1 if augment == "none" else 3, augment=augment, seed=3)  # type: ignore[arg-type]
            for view in range(views.count):
                drawn = self.example.draw(size, views, "a", view)
                assert drawn == self.example.draw(size, views, "a", view)
                assert len(drawn.parameters) == len(self.example.parameters)
                rendered = self.example.render(item, drawn)
                np.testing.assert_array_equal(rendered, self.example.render(self.example.decode(encoded), drawn))

    def test_a_batch_for_the_model_is_finite(self, encoded: bytes) -> None:
        item = self.example.decode(encoded)
        view = self.example.draw(self.example.size_of(item), Views(), "a", 0)
        rendered = torch.from_numpy(np.stack([self.example.render(item, view)] * 2))
        batch = self.example.to_model(rendered)
        assert len(batch) == 2
        assert batch.is_floating_point() == (self.example.kind == "image")
        assert batch.isfinite().all()

    def test_blank_samples_are_rendered_ones(self, encoded: bytes) -> None:
        item = self.example.decode(encoded)
        rendered = self.example.render(item, self.example.draw(self.example.size_of(item), Views(), "a", 0))
        blank = self.example.blank(2)
        assert blank.shape == (2, *rendered.shape)
        assert blank.numpy().dtype == rendered.dtype

    def test_samples_of_one_width_go_together(self, encoded: bytes) -> None:
        blank = self.example.blank(3)
        found = list(self.example.by_width(blank))
        assert sorted(i for at, _ in found for i in torch.arange(3)[at].tolist()) == [0, 1, 2]
        item = self.example.decode(encoded)
        view = self.example.draw(self.example.size_of(item), Views(), "a", 0)
        rendered = torch.from_numpy(self.example.render(item, view)[None].copy())
        ((_, part),) = self.example.by_width(rendered)
        if not self.example.alike:
            assert part.shape[1] == self.example.width(view.parameters)
