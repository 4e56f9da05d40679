"""What counts as a difference between two runs of the same requests."""

from bench.equality import bodies, compare


def test_differences_are_counted_over_all_pairs_with_their_first_position() -> None:
    one = [["a", "b", "c"], ["d", "e"], ["f"]]
    other = [["a", "b", "x"], ["d", "e"], ["f"]]
    found = compare([(one, other), (one, one), (other, one)])
    assert (found.compared, found.firsts) == (9, [2, 2])
    assert found.share == 2 / 9


def test_an_answer_that_ends_early_differs_where_it_ends() -> None:
    assert compare([([["a", "b"]], [["a"]])]).firsts == [1]


def test_every_kind_of_request_is_asked() -> None:
    kinds = {(body["temperature"] > 0, "presence_penalty" in body) for body in bodies(24)}
    assert kinds == {(seeded, penalised) for seeded in (False, True) for penalised in (False, True)}
