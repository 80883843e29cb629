import pytest
from omegaconf import OmegaConf

from humanline.config import component
from humanline.errors import ConfigError, DataError


def needs(tokenizer, source="here", tables=None):
    """A component of a user."""
    if source == "absent":
        raise ConfigError("source: file 'absent' not found")
    if tables:
        raise DataError("tables: 3 rows cannot be used")
    raise ConfigError("tokenizer: has no chat template")


@pytest.mark.parametrize("key", ["dataset", "dataset_val"])
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"source": "absent"}, ConfigError, "{}.source: file 'absent' not found"),
        ({"tables": 3}, DataError, "{}.tables: 3 rows cannot be used"),
        ({}, ConfigError, "tokenizer: has no chat template"),  # no argument of the config
    ],
)
def test_an_error_about_an_argument_names_its_whole_key(key, arguments, kind, message):
    cfg = OmegaConf.create({key: {"_component_": f"{__name__}.needs", **arguments}})
    with pytest.raises(kind) as raised:
        component(cfg, key, object())
    assert str(raised.value) == message.format(key)
