"""One line from a foreign exception; knows neither who raises nor who reads it."""

_LONGEST = 240


def one_line(failure: object) -> str:
    """Return what `failure` says, without line breaks and not longer than three terminal lines."""
    text = " ".join(str(failure).split()) or type(failure).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
