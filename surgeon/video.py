"""Which files are videos: by their names, and by how their bytes begin."""

from pathlib import Path

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts")
_BEGINNINGS = (
    b"\x1aE\xdf\xa3",  # Matroska, WebM
    b"\0\0\x01\xba",  # MPEG program stream
    b"\0\0\x01\xb3",  # MPEG video
    b"FLV\x01",
    bytes.fromhex("3026b2758e66cf11"),  # ASF: WMV
)
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_TRANSPORT_PACKET = 188


def is_video(path: Path) -> bool:
    """Whether a file is one. A name that says so is enough; without it, as a server receives files, the bytes tell.

    Raises OSError where the bytes are needed and cannot be read.
    """
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(_TRANSPORT_PACKET + 1)
    if start[4:8] == b"ftyp":  # MP4 and QuickTime, and in the same container AVIF and HEIF images
        return start[8:12] not in _STILL_BRANDS
    is_avi = start[:4] == b"RIFF" and start[8:12] == b"AVI "
    is_transport_stream = len(start) > _TRANSPORT_PACKET and start[0] == start[_TRANSPORT_PACKET] == ord("G")
    return start.startswith(_BEGINNINGS) or start[4:8] in (b"moov", b"mdat") or is_avi or is_transport_stream
