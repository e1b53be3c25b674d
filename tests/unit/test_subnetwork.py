from __future__ import annotations

import pytest

from secateur.errors import SecateurError
from secateur.subnetwork import SubNetwork

T, F = True, False
SUB = SubNetwork(((T, F, T, T), (F, F, F, F)), ((T, F, F, F, T),))


def test_widths_and_masks() -> None:
    assert SUB.head_widths == (3, 0)
    assert SUB.neuron_widths == (2,)
    assert not SUB.keeps_everything
    heads, neurons = SUB.masks()
    assert heads[0].tolist() == [1, 0, 1, 1]
    assert SubNetwork.from_masks(heads, neurons) == SUB


def test_json_form_is_hexadecimal_most_significant_bit_first() -> None:
    assert SUB.to_dict() == {"heads": ["4:b", "4:0"], "neurons": ["5:11"]}
    assert SubNetwork.from_dict(SUB.to_dict()) == SUB


def test_empty_blocks_survive_the_round_trip() -> None:
    empty = SubNetwork(((),), ((T,),))
    assert SubNetwork.from_dict(empty.to_dict()) == empty


@pytest.mark.parametrize("mask", ["4", "4:", "x:f", "4:ff", "4:g", "3:f", "-1:0", None, 7])
def test_unreadable_masks_are_refused(mask: object) -> None:
    with pytest.raises(SecateurError, match="is no mask"):
        SubNetwork.from_dict({"heads": [mask], "neurons": []})


def test_composition_counts_in_the_units_that_are_left() -> None:
    second = SubNetwork(((T, F, T), ()), ((F, T),))
    assert SUB.then(second) == SubNetwork(((T, F, F, T), (F, F, F, F)), ((F, F, F, F, T),))
    with pytest.raises(SecateurError, match="cannot follow"):
        SUB.then(SUB)


def test_digest_is_stable_and_tells_networks_apart() -> None:
    assert SUB.digest == SubNetwork.from_dict(SUB.to_dict()).digest
    assert SUB.digest != SubNetwork(SUB.heads, ((T, F, F, T, F),)).digest
    assert len(SUB.digest) == 16
