"""Groups of responses to a prompt: their sources, and their layout in rows."""

from humanline.data._builders import encoded_groups, labelled_groups, preference_groups, scored_groups
from humanline.data._chat import ChatTokenizer
from humanline.data._dataset import GroupDataset
from humanline.data._derive import as_labelled, as_pairs, as_scored, best_and_worst
from humanline.data._group import Group, TokenBudget
from humanline.data._read import read_records, take
from humanline.data._record import Message, Record
from humanline.data._rows import RowBudget, Rows, lay_out, pack, parts
from humanline.data._source import End, OfflineSource, Source

__all__ = [
    "ChatTokenizer",
    "End",
    "Group",
    "GroupDataset",
    "Message",
    "OfflineSource",
    "Record",
    "RowBudget",
    "Rows",
    "Source",
    "TokenBudget",
    "as_labelled",
    "as_pairs",
    "as_scored",
    "best_and_worst",
    "encoded_groups",
    "labelled_groups",
    "lay_out",
    "pack",
    "parts",
    "preference_groups",
    "read_records",
    "scored_groups",
    "take",
]
