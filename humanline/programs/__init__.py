"""Shared parts of the recipes that do not train: sampling, scoring, measuring data, and output that resumes."""

from humanline.checkpoint import read_weights
from humanline.config import check_keys, component, dated_component, load_config, one_of, today, with_overrides
from humanline.launch import (
    check_one_process,
    common_end,
    hide_known_warnings,
    parse,
    process_group,
    start_on_every_device,
)
from humanline.programs._json_fields import warn_of_replaced, with_json_fields
from humanline.programs._mean_log_probs import check_fit, mean_log_probs
from humanline.programs._output_file import check_outputs, write_json, write_jsonl
from humanline.programs._partial_file import PartialFile
from humanline.programs._quality import Filter, Measured, as_line, draw_histogram, histogram, summary, table
from humanline.programs._sampler import READING, Sampler, SamplerSettings, reading
from humanline.programs._scored_rows import Scorer, check_facts, score_sources
from humanline.programs._whole_model import model_sources, whole_model
from humanline.programs._whole_number import whole_number, whole_numbers

__all__ = [
    "READING",
    "Filter",
    "Measured",
    "PartialFile",
    "Sampler",
    "SamplerSettings",
    "Scorer",
    "as_line",
    "check_facts",
    "check_fit",
    "check_keys",
    "check_one_process",
    "check_outputs",
    "common_end",
    "component",
    "dated_component",
    "draw_histogram",
    "hide_known_warnings",
    "histogram",
    "load_config",
    "mean_log_probs",
    "model_sources",
    "one_of",
    "parse",
    "process_group",
    "read_weights",
    "reading",
    "score_sources",
    "start_on_every_device",
    "summary",
    "table",
    "today",
    "warn_of_replaced",
    "whole_model",
    "whole_number",
    "whole_numbers",
    "with_json_fields",
    "with_overrides",
    "write_json",
    "write_jsonl",
]
