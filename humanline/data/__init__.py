"""Groups of responses to a prompt: their sources, and their layout in rows."""

from humanline.data._builders import encoded_groups, labelled_groups, preference_groups, scored_groups
from humanline.data._chat import ChatTokenizer
from humanline.data._chat_template import template_environment
from humanline.data._dataset import GroupDataset
from humanline.data._day import read_day
from humanline.data._derive import as_labelled, as_pairs, as_scored, best_and_worst
from humanline.data._examples import prompt_field, read_prompt
from humanline.data._group import Group, TokenBudget
from humanline.data._messages import Message
from humanline.data._query_blocks import QueryBlock
from humanline.data._read import DataFiles, SourceName, open_rows
from humanline.data._record import BadRow, Record
from humanline.data._rows import RowBudget, Rows, lay_out, pack, parts
from humanline.data._source import End, OfflineSource, Source
from humanline.data._tally import Tally

__all__ = [
    "BadRow",
    "ChatTokenizer",
    "DataFiles",
    "End",
    "Group",
    "GroupDataset",
    "Message",
    "OfflineSource",
    "Record",
    "QueryBlock",
    "RowBudget",
    "Rows",
    "Source",
    "SourceName",
    "Tally",
    "TokenBudget",
    "as_labelled",
    "as_pairs",
    "as_scored",
    "best_and_worst",
    "encoded_groups",
    "labelled_groups",
    "lay_out",
    "open_rows",
    "pack",
    "parts",
    "preference_groups",
    "prompt_field",
    "read_day",
    "read_prompt",
    "scored_groups",
    "template_environment",
]
