"""Before anything is trained: can every source give a sample at all?"""

from collections import Counter
from collections.abc import Mapping, Sequence

from vlbeit.data.records import BadSample, RecordSource
from vlbeit.data.transforms import BadImage, BadText, clean_text, decode_image
from vlbeit.errors import DataBudgetError
from vlbeit.types import Stream

PROBED = 64
"""Records of a source, spread over it, that may all be bad before it counts as unusable."""


def check_sources(sources: Mapping[Stream, Sequence[RecordSource]]) -> None:
    """Read records of every source until one is usable; needs no tokenizer and no model.

    Raises:
        DataBudgetError: the first `PROBED` records tried (all of them, if there are fewer) are
            bad; names source, stream, reasons and an example.
    """
    for stream, group in sources.items():
        for source in group:
            reasons: Counter[str] = Counter()
            example = ""
            tried = min(PROBED, len(source))
            for number in range(tried):
                try:
                    check_record(stream, source, number * len(source) // tried)
                    break
                except BadSample as bad:
                    reasons[bad.reason] += 1
                    example = str(bad)
            else:
                often = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
                raise DataBudgetError(
                    f"no usable sample in source {source.name} of the {stream} stream: all of "
                    f"{tried} records tried are bad ({often}), for example {example}; check it "
                    "with `vlbeit verify`"
                )


def check_record(stream: Stream, source: RecordSource, index: int) -> None:
    """Raise BadSample unless the record has what its stream needs."""
    record = source.read(index)
    try:
        if stream == "text":
            lines: list[bytes] | list[str] = record.members.get("txt", b"").splitlines()
            first_clean(lines)
            return
        if stream == "pair":
            first_clean(record.captions())
        decode_image(record.image())
    except (BadImage, BadText) as bad:
        raise BadSample(record.shard, record.key, bad.reason, bad.detail) from None


def first_clean(lines: Sequence[bytes] | Sequence[str]) -> str:
    """The first line that is usable text; else the last line's BadText."""
    error = BadText("empty_text", "no text at all")
    for line in lines:
        try:
            return clean_text(line)
        except BadText as bad:
            error = bad
    raise error
