"""The class that loads an export's tokenizer is tried while the weights are written, and they stay whatever comes."""

import pytest

from checkpoints_convert.checkpoint_source import open_checkpoint
from checkpoints_convert.conversion import Converted
from checkpoints_convert.to_hf import ExportOptions, export
from megatron_qwen.data.tokenizers.release import AS_WRITTEN, Loader, LoaderSearch
from megatron_qwen.errors import ConversionError, Problem


def export_run(run_dir, out) -> Converted:
    return export(open_checkpoint(run_dir), out, ExportOptions(quiet=True))


def test_the_card_names_the_class_that_was_found(finished_run, tmp_path, monkeypatch, caplog):
    """What was expected was not right with this version of transformers, and the other class is."""
    found = Loader(AS_WRITTEN, "AutoTokenizer gives other ids")
    monkeypatch.setattr(LoaderSearch, "_search", lambda _: found)
    export_run(finished_run, tmp_path / "hf")
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained" in (tmp_path / "hf/README.md").read_text()
    assert "load it with PreTrainedTokenizerFast" in caplog.text
    assert export_run(finished_run, tmp_path / "hf").complete_before


def test_weights_stay_where_no_class_is_right(finished_run, tmp_path, monkeypatch):
    def refused(_: LoaderSearch) -> Loader:
        raise ConversionError(Problem("tok", None, "cannot be released."))

    with monkeypatch.context() as patched:
        patched.setattr(LoaderSearch, "_search", refused)
        with pytest.raises(ConversionError, match="cannot be released") as caught:
            export_run(finished_run, tmp_path / "hf")
    assert "weights: are written and kept" in str(caught.value)
    done = export_run(finished_run, tmp_path / "hf")
    assert done.kept_bytes == done.weight_bytes > 0
    assert (tmp_path / "hf/manifest.json").is_file()
