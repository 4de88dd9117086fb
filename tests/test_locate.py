from __future__ import annotations

import pytest

from qlora_utils.locate import is_path, locate, model_advice


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (type("GatedRepoError", (Exception,), {})("403"), "hf auth login"),
        (OSError("You are trying to access a gated repo."), "licence"),
        (type("RepositoryNotFoundError", (Exception,), {})("404"), "Check the name"),
        (OSError("We couldn't connect"), "give a local folder"),
    ],
)
def test_a_model_out_of_reach_says_how_to_get_in(error, advice):
    assert advice in model_advice("meta-llama/Llama-2-7b-hf", error)


def test_what_can_only_be_a_path():
    for source in ("/a", "./a", "~/a", "name", "a/b/c", "embedded:pocket"):
        assert is_path(source)
    assert not is_path("owner/name")
    assert is_path("folder/rows.CSV", (".csv",))


def test_embedded_sources_lie_in_the_project():
    assert locate("embedded:pocket/model").endswith("data/pocket/model")
    assert locate("owner/name") == "owner/name"
