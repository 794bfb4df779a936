"""Regular expressions that users write."""

import re
import warnings


def compiled(text: str) -> re.Pattern[str]:
    """The expression.

    Raises:
        re.error: the text is none.
    """
    with warnings.catch_warnings():
        # What Python may come to read otherwise one day ("[[") is still an expression.
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(text)
