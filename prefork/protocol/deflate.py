"""permessage-deflate (RFC 7692), as a WebSocket's two sides agree on it: negotiated, applied, undone.

The compression is that of the `websockets` library; what is ours is how much memory it
may take, and the end of a stream. Which messages are compressed is the session's to say.

The one fact: without a word to the contrary, each message is compressed with what the
ones before it held. So whoever leaves one out cannot read, or be read, from there on.
"""

from __future__ import annotations

import zlib

from websockets.exceptions import InvalidHeader, NegotiationError, PayloadTooBig, ProtocolError
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.headers import build_extension, parse_extension

# What both sides remember for compression, as powers of two, bytes. 12 and memLevel 5 are what the library's
# own server takes: 32 KB a connection for what we send instead of 256 KB, for messages that grow by a few per cent.
WINDOW_BITS = 12
MEMORY_LEVEL = 5

# A client that flushes by ending its stream puts an empty byte after it (RFC 7692, section 7.2.3.4),
# and every message has this behind it when it is inflated.
_EMPTY_BLOCK = b"\x00\x00\xff\xff"
_AFTER_THE_END = (_EMPTY_BLOCK, b"\x00" + _EMPTY_BLOCK, b"\x00", b"")


def negotiate(offers: str) -> tuple[str, Deflate] | None:
    """The answer to the client's Sec-WebSocket-Extensions, and the compression it stands for; None for none.

    What we send is compressed within a window of `WINDOW_BITS`, and the client is
    asked to do the same where it says that it can; otherwise 15 bits, 32 KB.
    """
    if "permessage-deflate" not in offers:
        return None
    try:
        extensions = parse_extension(offers)
    except InvalidHeader:
        return None  # RFC 6455, section 9.1, lets us fail the handshake; without it there is just no compression
    for name, parameters in extensions:
        if name == "permessage-deflate":
            try:
                agreed, extension = _FACTORY.process_request_params(parameters, [])
            except NegotiationError:
                continue  # the client may have put a simpler offer behind this one
            return build_extension([(name, agreed)]), Deflate(extension)
    return None


_FACTORY = ServerPerMessageDeflateFactory(
    server_max_window_bits=WINDOW_BITS,
    client_max_window_bits=WINDOW_BITS,
    compress_settings={"memLevel": MEMORY_LEVEL},
)


class Deflate:
    """permessage-deflate as agreed on with one client.

    A client may end its deflate stream with a message (RFC 7692, section 7.2.3.4). The
    library's decoder would take everything after that for rubbish, and keep it all.
    So a stream that has ended is followed by a new one; one that ends elsewhere is an error.
    """

    __slots__ = ("_extension", "_growth")

    def __init__(self, extension: PerMessageDeflate) -> None:
        self._extension = extension
        self._growth = 0

    def allow_growth(self, max_size: int) -> int:
        """What a message of up to *max_size* bytes may have on the wire; also the limit that `decode` expects.

        What cannot be compressed grows. In stored blocks that is five bytes for each 16 KB, and for each
        127 bytes with the least memory; in the fixed code an eighth, which is the worst of zlib's.
        """
        self._growth = max_size // 8 + 64
        return max_size + self._growth

    def deflate(self, payload: bytes) -> bytes:
        """The payload of a whole compressed message."""
        return bytes(self._extension.encode(Frame(Opcode.BINARY, payload)).data)

    def inflate(self, payload: bytes, max_size: int) -> bytes:
        """The other way. Raises PayloadTooBig above *max_size* bytes, and ProtocolError for what is no deflate."""
        return bytes(self._decode(Frame(Opcode.BINARY, payload, rsv1=True), max_size).data)

    def encode(self, frame: Frame) -> Frame:
        """What the library calls for each frame it writes: close frames, which are not compressed."""
        return self._extension.encode(frame)

    def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
        """What the library calls for each frame it reads. *max_size* is what is left of `allow_growth`."""
        assert max_size is not None
        return frame if frame.opcode >= Opcode.CLOSE else self._decode(frame, max_size - self._growth)

    def _decode(self, frame: Frame, max_size: int) -> Frame:
        extension = self._extension
        is_compressed = frame.rsv1 or (frame.opcode is Opcode.CONT and extension.decode_cont_data)
        plain = extension.decode(frame, max_size=max(max_size, 1))  # zlib takes 0 for no limit
        if len(plain.data) > max_size:
            raise PayloadTooBig(None, max_size)
        decoder = getattr(extension, "decoder", None)  # none between messages of a client that forgets
        if is_compressed and decoder is not None and decoder.eof:
            if not frame.fin or decoder.unused_data not in _AFTER_THE_END:
                raise ProtocolError("a deflate stream ends within a message")
            extension.decoder = zlib.decompressobj(wbits=-extension.remote_max_window_bits)
        return plain
