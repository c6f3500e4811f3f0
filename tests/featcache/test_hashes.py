import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from featcache.identical import again, copies, embedding_hashes, numbered

FEW = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12)
"""Hashes as their first and last byte: some have one half in common and not the other."""


def hashes(pairs):
    found = np.zeros((len(pairs), 16), np.uint8)
    found[:, 0], found[:, 15] = np.reshape(pairs, (-1, 2)).T
    return found


@given(FEW, FEW)
def test_they_equal_slow_loops(these, those):
    assert copies(hashes(these), hashes(those)).tolist() == [those.count(each) for each in these]
    assert again(hashes(these)).tolist() == [each in these[:i] for i, each in enumerate(these)]
    numbers = numbered(hashes(these)).tolist()
    assert all((numbers[i] == numbers[j]) == (a == b) for i, a in enumerate(these) for j, b in enumerate(these))
    assert set(numbers) == set(range(len(set(these))))


def test_embeddings_are_equal_where_all_values_are_whatever_their_dtype():
    rows = np.array([[1, 0.5, -0.0], [1, 0.5, 0.0], [1, 0.5, 2**-24], [1, 0.5, np.inf]])
    half, single = (embedding_hashes([rows[:1].astype(t), rows[1:].astype(t)]) for t in (np.float16, np.float32))
    assert (half == single).all()
    assert numbered(half).tolist() == numbered(embedding_hashes([rows])).tolist()
    assert len(set(numbered(half).tolist())) == 3
    assert numbered(half)[0] == numbered(half)[1]
