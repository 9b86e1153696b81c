"""Servers on loopback: one that does what goes wrong, one like the Hub, one like the share of the released weights."""

import ssl
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import trustme

PAGE = b"<!DOCTYPE html><html><head><title>Google Drive -\n Virus scan warning</title></head><body>...</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 82563112\n"


class Server(ThreadingHTTPServer):
    """Serves `content` by https; what it does wrong, and how often it was asked, are its attributes."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.environment = dict(SSL_CERT_FILE=str(folder / "ca.pem"))
        self.url = f"https://127.0.0.1:{self.server_port}/weights"
        self.location = None
        self.content, self.code, self.limit, self.pause, self.asked = b"", 200, None, 0.0, 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked += 1
        if server.location:
            self.send_response(302)
            self.send_header("Location", server.location)
            self.end_headers()
            return
        if server.code != 200:
            self.send_error(server.code)
            return
        self.send_response(200)
        if server.limit is None:
            self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        try:
            for i in range(0, len(content := server.content[: server.limit]), 1 << 16):
                time.sleep(server.pause)
                self.wfile.write(content[i : i + (1 << 16)])
        except OSError:
            pass  # the client is gone

    def log_message(self, *_):
        pass


class Hub(ThreadingHTTPServer):
    """The folder of a repository, as the Hugging Face Hub has it at OWNER/NAME/resolve/REVISION/FILE."""

    daemon_threads = True

    def __init__(self, folder, token=None):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.folder, self.authorization = folder, f"Bearer {token}" if token else None


class HubHandler(SimpleHTTPRequestHandler):
    def translate_path(self, path):
        return str(self.server.folder / path.rpartition("/")[2])

    def send_head(self):
        if self.server.authorization in (None, self.headers.get("Authorization")):
            return super().send_head()
        self.send_error(401)

    def end_headers(self):
        self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()

    def log_message(self, *_):
        pass


class Share(ThreadingHTTPServer):
    """A proxy to a world in which Google Drive holds `content`, behind its page about viruses, or says `error`."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), ShareHandler)
        self.content, self.error, self.asked = b"", "", []
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("drive.google.com", "drive.usercontent.google.com").configure_cert(self.context)
        self.environment = dict(
            HTTPS_PROXY=f"http://127.0.0.1:{self.server_port}",
            https_proxy=f"http://127.0.0.1:{self.server_port}",
            REQUESTS_CA_BUNDLE=str(folder / "ca.pem"),
            NO_PROXY="",
            no_proxy="",
        )


class ShareHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_CONNECT(self):
        """What follows on this connection is spoken to the host asked for, encrypted."""
        self.send_response(200)
        self.end_headers()
        self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", buffering=0)
        self.close_connection = False

    def finish(self):
        super().finish()
        self.connection.close()

    def do_GET(self):
        url, server = urlsplit(self.path), self.server
        query, host = {key: values[0] for key, values in parse_qs(url.query).items()}, self.headers["Host"]
        server.asked.append(query.get("id"))
        if (host, url.path, query.get("confirm")) == ("drive.usercontent.google.com", "/download", "t"):
            self.answer(server.content, "application/octet-stream", 'attachment; filename="light.pth"')
        elif server.error:
            self.answer(f'<html><p class="uc-error-subcaption">{server.error}</p></html>'.encode(), "text/html")
        else:
            fields = {"id": query["id"], "export": "download", "confirm": "t", "uuid": "1-2-3"}
            hidden = "".join(f'<input type="hidden" name="{name}" value="{value}">' for name, value in fields.items())
            form = f'<form id="download-form" action="https://drive.usercontent.google.com/download">{hidden}</form>'
            self.answer(PAGE.replace(b"...", form.encode()), "text/html")

    def answer(self, content, kind, disposition=None):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if disposition:
            self.send_header("Content-Disposition", disposition)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def running(server):
    """The server, answering in a thread of its own."""
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
