"""The parts of the HTML report."""

import base64
import io

import matplotlib.image
import numpy as np
import pytest

from vqvae_jax import html_report


def test_history_leaves_out_what_is_no_object(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert html_report.read_history(path) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n[3]\n\xff\xfe\n{"step": 4, "loss": NaN}\n')
    assert [entry["step"] for entry in html_report.read_history(path)] == [1, 4]


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_shown_slices_are_distinct_in_order_and_have_both_ends(limit):
    order = list(np.random.default_rng(0).permutation(23))
    shown = html_report.shown_slices(order, limit)
    places = [order.index(index) for index in shown]
    assert places == sorted(set(places)) and len(places) == min(limit, 23)
    assert shown[0] == order[0] and (limit == 1 or shown[-1] == order[-1])


def test_png_is_the_transposed_image_to_half_a_grey_level():
    image = np.random.default_rng(0).uniform(size=(6, 4)).astype(np.float32)
    encoded = html_report.png_data_uri(image).removeprefix("data:image/png;base64,")
    decoded = matplotlib.image.imread(io.BytesIO(base64.b64decode(encoded)), format="png")
    np.testing.assert_allclose(decoded, image.T, atol=0.5 / 255 + 1e-6)
