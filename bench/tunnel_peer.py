"""What tunnels lead to: a server on loopback that gives a file, compares with it, or echoes.

The first byte of a connection says which: ``g`` and eight bytes of length, the same with ``t`` to
take so many and answer with one byte, or ``e``. It prints its port and ends with its stdin.
"""

import mmap
import os
import signal
import socket
import sys
import threading


def _whole(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def _serve(connection: socket.socket, content: mmap.mmap) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        try:
            kind = _whole(connection, 1)
            if kind == b"e":
                while data := connection.recv(65536):
                    connection.sendall(data)
            elif not os.fork():
                # A process of its own: threads would wait for each other.
                try:
                    _bulk(connection, content, kind)
                finally:
                    os._exit(0)
        except (EOFError, OSError):
            pass


def _bulk(connection: socket.socket, content: mmap.mmap, kind: bytes) -> None:
    size = int.from_bytes(_whole(connection, 8), "big")
    if kind == b"g":
        connection.sendall(memoryview(content)[:size])
        connection.recv(1)  # until the other end has closed
        return
    position, buffer = 0, bytearray(1 << 18)
    while position < size:
        count = connection.recv_into(buffer)
        if not count or buffer[:count] != content[position : position + count]:
            connection.sendall(b"-")
            return
        position += count
    connection.sendall(b"+")


def main(path: str) -> None:
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    print(listener.getsockname()[1], flush=True)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    def end() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection, content), daemon=True).start()


main(sys.argv[1])
