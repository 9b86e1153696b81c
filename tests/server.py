"""An HTTP server on loopback that does whatever goes wrong with downloads."""

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = bytes(range(256)) * 4096  # 1 MiB
PAGE = b"<!DOCTYPE html><html><head><title>Google Drive -\n Virus scan warning</title></head><body>...</body></html>"


class Server(ThreadingHTTPServer):
    """Serves CONTENT on loopback; what it does wrong, and what it was asked, are its attributes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/weights"
        self.content, self.ranges, self.codes = CONTENT, True, []
        self.limits = []  # bytes after which each answer in turn breaks off
        self.pause = 0.0  # before every 64 KiB
        self.asked = []  # the Range header of each request


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", server.url)
            self.end_headers()
            return
        if server.codes:
            self.send_error(server.codes.pop(0))
            return
        start, body = 0, server.content
        if server.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
            if server.ranges:
                self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        limit = server.limits.pop(0) if server.limits else len(body)
        try:
            for i in range(start, min(len(body), start + limit), 1 << 16):
                time.sleep(server.pause)
                self.wfile.write(body[i : min(i + (1 << 16), start + limit)])
        except OSError:
            pass  # the client is gone

    def log_message(self, *_):
        pass
