"""A DICOM file's attributes, read within a budget: millions of empty elements deflate to some kilobytes.

pydicom parses; it reads through a stream that charges for every read, and sequences, which it would parse when they are
first looked at, from bytes that it has kept, are parsed here and at once, on the same account.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

from medloop.errors import ImageTooLarge, InvalidImage

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

# In bytes; the other prices say how many bytes take as long (about a tenth of a microsecond each) as they do. So a
# header takes half a second at most, and those of some hundred frames with all their attributes have room.
_BUDGET: Final = 5 * 2**20
_READ: Final = 16
_ITEM: Final = 80
_ITEM_TAGS: Final = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")
_PIXEL_DATA: Final = 0x7FE00010


@dataclass(slots=True)
class _Account:
    left: int = _BUDGET
    pixels: bool = False  # whether pixels are being read, whose number other limits bound

    def charge(self, data: bytes) -> None:
        self.left -= _READ
        if not self.pixels:
            self.left -= len(data) + _ITEM * data.startswith(_ITEM_TAGS)
        if self.overdrawn:
            raise _too_much()

    @property
    def overdrawn(self) -> bool:
        return self.left < 0

    def passes(self, tag: int, _vr: str | None, _length: int) -> bool:
        """What pydicom asks before each value of the file's own level: never a reason to stop."""
        if tag == _PIXEL_DATA and self.pixels:
            raise InvalidImage("This DICOM file is damaged: it has pixels twice; export it again.")
        self.pixels = tag == _PIXEL_DATA
        return False


class _Metered(BytesIO):
    def __init__(self, data: bytes, account: _Account) -> None:
        super().__init__(data)
        self._account = account

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._account.charge(data)
        return data


def read_attributes(data: bytes, start: int, syntax: "UID", tags: Iterable[int]) -> "Dataset":
    """The elements `tags` of the data set at `start`. Raises ImageTooLarge where there is too much beside the pixels,
    InvalidImage for pixels that come twice, and whatever pydicom raises."""
    from pydicom.filereader import read_dataset  # an extra, and half a second to import

    account = _Account()
    stream = _Metered(data, account)
    stream.seek(start)
    wanted: list[Any] = list(tags)
    try:
        dataset = read_dataset(
            stream, syntax.is_implicit_VR, syntax.is_little_endian, stop_when=account.passes, specific_tags=wanted
        )
        account.pixels = False
        _parse_sequences(dataset, account)
    except Exception as exc:
        if account.overdrawn:  # pydicom takes whatever ends a read for the end of the file
            raise _too_much() from exc
        raise
    return dataset


def _parse_sequences(dataset: "Dataset", account: _Account) -> None:
    from pydicom.dataelem import DataElement, RawDataElement
    from pydicom.filereader import read_sequence

    for tag in list(dataset.keys()):
        element: Any = dataset.get_item(tag)
        if not _is_sequence(element):
            continue
        if isinstance(element, RawDataElement):
            value = element.value or b""
            items = read_sequence(
                _Metered(value, account), element.is_implicit_VR, element.is_little_endian, len(value), "iso8859"
            )
            dataset[tag] = element = DataElement(tag, "SQ", items)
        for item in element.value:
            _parse_sequences(item, account)


def _is_sequence(element: Any) -> bool:
    """Whether pydicom takes an element for a sequence: because the file says so, or where it does not say, because the
    standard does."""
    from pydicom.datadict import dictionary_has_tag, dictionary_VR

    if element.VR in (None, "UN"):
        return dictionary_has_tag(element.tag) and dictionary_VR(element.tag) == "SQ"
    return bool(element.VR == "SQ")


def _too_much() -> ImageTooLarge:
    return ImageTooLarge(
        "This DICOM file has too many attributes beside its image: export the image, or one frame of it, alone."
    )
