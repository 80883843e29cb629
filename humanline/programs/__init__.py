"""Shared parts of the recipes that do not train: sampling, scoring, and output that an interrupted program resumes."""

from humanline.checkpoint import read_weights
from humanline.config import check_keys, component, load_config, one_of, with_overrides
from humanline.launch import check_one_process, common_end, hide_known_warnings, parse
from humanline.programs._json_fields import warn_of_replaced, with_json_fields
from humanline.programs._output_file import write_json, write_jsonl
from humanline.programs._partial_file import PartialFile
from humanline.programs._sampler import READING, Sampler, SamplerSettings, reading
from humanline.programs._scored_rows import Scorer, check_facts, score_sources
from humanline.programs._whole_number import whole_number, whole_numbers

__all__ = [
    "READING",
    "PartialFile",
    "Sampler",
    "SamplerSettings",
    "Scorer",
    "check_facts",
    "check_keys",
    "check_one_process",
    "common_end",
    "component",
    "hide_known_warnings",
    "load_config",
    "one_of",
    "parse",
    "read_weights",
    "reading",
    "score_sources",
    "warn_of_replaced",
    "whole_number",
    "whole_numbers",
    "with_json_fields",
    "with_overrides",
    "write_json",
    "write_jsonl",
]
