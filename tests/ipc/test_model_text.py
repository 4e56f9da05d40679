import pytest

from daemon.ipc.model_text import text_digest

FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_a_process_reads_at_its_start_changes_the_digest(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    digests = [text_digest(str(tmp_path))]
    for content in ("one", "two"):
        file.write_text(content)
        digests.append(text_digest(str(tmp_path)))
    assert len(set(digests)) == 3


def test_weights_do_not_count(tmp_path):
    before = text_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert text_digest(str(tmp_path)) == before
