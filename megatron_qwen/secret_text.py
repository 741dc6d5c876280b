"""Secrets in texts that would be written down or sent: how they are recognised, and how they are masked."""

import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(
    r"(^|_)(KEY|PASS|PAT)$|(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY|API_KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS?|AUTH)(_|$)",
    re.IGNORECASE,
)
# What tokens of well-known services look like.
_SECRET_VALUE = re.compile(
    r"(hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|glpat-[A-Za-z0-9_-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|wandb_v1_\w{20,}|^[0-9a-f]{40}$)"
)
_LONG_ENOUGH = 8  # a shorter value (yes, 1, test) would be found in harmless text


def is_secret_name(name: str) -> bool:
    """Whether a variable or field of this name would hold a secret."""
    return _SECRET_NAME.search(name) is not None


def secret_in(text: str, environ: Mapping[str, str]) -> str | None:
    """Where a text holds a secret, what it is; None where it holds none.

    Args:
        text: any text that would be written down.
        environ: the submitting shell's variables: the value of one with a telling name is a secret wherever it stands.
    """
    for name, value in environ.items():
        if len(value) >= _LONG_ENOUGH and is_secret_name(name) and value in text:
            return f"the value of ${name}"
    found = _SECRET_VALUE.search(text)
    return None if found is None else f"what looks like a key ({found.group()[:4]}...)"


def masked(text: str, environ: Mapping[str, str]) -> str:
    """The text with ``***`` in the place of what ``secret_in`` would find."""
    for name, value in environ.items():
        if len(value) >= _LONG_ENOUGH and is_secret_name(name):
            text = text.replace(value, "***")
    return _SECRET_VALUE.sub("***", text)
