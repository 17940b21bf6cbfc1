"""Numbers side by side, with as many digits as it takes to tell them apart."""

#: What an fp64 number may need.
_MOST = 17


def apart(*numbers: float, digits: int = 6) -> list[str]:
    """Each number in ``digits`` significant digits, or in more if different ones look alike."""
    different = len({repr(float(number)) for number in numbers})
    for count in range(digits, _MOST):
        texts = [f"{number:.{count}g}" for number in numbers]
        if len(set(texts)) == different:
            return texts
    return [f"{number:.{_MOST}g}" for number in numbers]
