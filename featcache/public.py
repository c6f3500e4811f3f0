"""What others may read: without the folders of this machine, passwords in addresses, and the hub's token."""

import re
from collections.abc import Mapping
from typing import Any

_FOLDERS = re.compile(r"(^|[:=])/(?:[^/:]+/)*(?=[^/:])")
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")
_KEYS = {
    "a token of the Hugging Face hub": r"\bhf_[A-Za-z0-9]{30,}",
    "a key of AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|aws_secret_access_key\s*[=:]",
    "a token of GitHub": r"\b(?:gh[opsur]_[A-Za-z0-9]{36}|github_pat_\w{22,})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_QUERY = re.compile(r"(\w+://[^\s?'\"<>]+)\?[^\s'\"<>]+")


def public(value: Any) -> Any:
    """Text, or what nests texts, in which an absolute path keeps its last part only, and an address no password and no
    query, where signatures stand."""
    if isinstance(value, Mapping):
        return {key: public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    if not isinstance(value, str):
        return value
    short = _FOLDERS.sub(r"\1", value)
    return without_secrets(short if short == value else short.rstrip("/"))


def without_secrets(text: str) -> str:
    """The text without passwords and queries of addresses, and without the token that this process logs in to the hub with."""
    token = _token()
    text = _QUERY.sub(r"\1", _PASSWORD.sub("", text))
    return text.replace(token, "…") if token else text


def secret_in(text: str) -> str:
    """What secret the text holds, in words; "" for none that is known."""
    token = _token()
    if token and token in text:
        return "the hub's token"
    if _PASSWORD.search(text):
        return "an address with a password"
    if found := next((what for what, looks in _KEYS.items() if re.search(looks, text)), ""):
        return found
    return "a signed address" if re.search(r"://\S+[?&][\w-]*(signature|token|sig)=", text, re.IGNORECASE) else ""


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()
