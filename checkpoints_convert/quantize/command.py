"""``mq convert quantize``, from parsed options to what is said at the end."""

import argparse
import json
import logging

from checkpoints_convert.arguments import size_in_bytes
from checkpoints_convert.formats.registry import FormatOptions, make_formats
from checkpoints_convert.hf_directory import HfDirectory
from checkpoints_convert.model_source import open_model_source
from checkpoints_convert.progress import gb
from checkpoints_convert.quantize.arguments import wanted
from checkpoints_convert.quantize.calibration_data import SampleChoice
from checkpoints_convert.quantize.calibration_options import CalibrationOptions
from checkpoints_convert.quantize.calibration_request import CalibrationRequest
from checkpoints_convert.quantize.gptq import GptqOptions
from checkpoints_convert.quantize.padding import padding_of, proposal
from checkpoints_convert.quantize.release import quantize_all
from checkpoints_convert.quantize.run import Quantized, QuantizeOptions
from megatron_qwen.config.sections import ModelConfig
from megatron_qwen.errors import ConfigError, Problem
from megatron_qwen.hf.kept import keys_with_effect

log = logging.getLogger(__name__)
_SAMPLE_LENGTH = 2048
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def run(options: argparse.Namespace) -> int:
    """Quantizes; exit code 0.

    Raises:
        UserError: whatever is wrong with options, source or output.
    """
    chosen = wanted(options)
    formats = make_formats(
        FormatOptions(options.group_size, options.asymmetric, options.act_order, options.fp8_blocks, options.damping)
    )
    source = open_model_source(
        options.source,
        iteration=options.iteration,
        config=options.config,
        overrides=options.overrides,
        tokenizer=options.tokenizer,
    )
    if source.directory is not None:
        words = " ".join(options.overrides) or None
        for given, value in (("--iteration", options.iteration), ("--config", options.config), ("overrides", words)):
            if value is not None:
                fix = f"{source.path} is a Hugging Face directory, which describes itself; omit this option."
                raise ConfigError(Problem(given, value, fix))
        _tell_of_directory(source.directory)
    how = QuantizeOptions(
        method="",
        dtype=options.dtype,
        padding=padding_of(options.pad_ffn, source.model),
        max_shard_bytes=size_in_bytes(options.max_shard_size),
        workers=options.workers,
        license_=options.license,
        restart=options.restart,
        quiet=options.json,
    )
    if (said := proposal(how.padding.model(source.model))) is not None:
        log.warning("%s", said)
    found = quantize_all(
        source,
        options.out,
        [formats[name] for name in chosen.formats],
        method=options.method,
        options=how,
        request=_calibration(options, source.model),
        gguf_kinds=chosen.gguf_kinds,
        importance=options.importance,
        single=chosen.is_single and not options.all,
        say=(lambda _: None) if options.json else _say,
    )
    if options.json:
        records = [one.as_json() for one in found]
        single = chosen.is_single and not options.all and len(records) == 1
        more = records[0] if single else {"out": str(options.out), "formats": records}
        print(json.dumps({"source": str(source.path), **more}))
    return 0


def _calibration(options: argparse.Namespace, model: ModelConfig) -> CalibrationRequest:
    """What the options say of calibration.

    Raises:
        ConfigError: with all that is out of range.
    """
    positions = model.max_position_embeddings
    length = options.sample_length or min(_SAMPLE_LENGTH, positions)
    if length > positions:
        fix = f"is more than the {positions:,} positions of the model; give less."
        raise ConfigError(Problem("--sample-length", length, fix))
    gptq = GptqOptions(damping=options.damping, act_order=options.act_order)
    memory = size_in_bytes(options.calibration_memory, option="--calibration-memory")
    how = CalibrationOptions(gptq=gptq, alpha=options.alpha, memory_bytes=memory)
    how.check()
    return CalibrationRequest(
        texts=tuple(options.calibrate),
        chats=tuple(options.calibrate_chats),
        tokens=options.calibrate_tokens,
        choice=SampleChoice(options.samples, length),
        options=how,
        restart=options.restart,
    )


def _tell_of_directory(directory: HfDirectory) -> None:
    """Says what of a directory is not quantized, or not as it looks."""
    for one in directory.passed_over:
        log.warning("%s: not converted: %s", directory.path, one)
    for one in directory.read_as:
        log.warning("%s: %s", directory.path, one)
    if effects := keys_with_effect(directory.config or {}):
        log.warning("%s: %s: is not computed here, and kept in config.json", directory.path, ", ".join(effects))
    if not set(_TOKENIZERS) & set(directory.tokenizer_files()):
        log.warning("%s holds no tokenizer: the release has none", directory.path)


def _say(one: Quantized) -> None:
    done = one.done
    if done.complete_before:
        print(f"{done.out}: is already complete; every file matches its manifest")
        return
    kept = f", {gb(done.kept_bytes)} of it kept from before" if done.kept_bytes else ""
    print(
        f"{done.out}: {one.facts.format_name} by {one.facts.method}, {gb(done.weight_bytes)}, "
        f"{one.facts.bits:.2f} bits a weight, {done.seconds:.1f} s{kept}"
    )
