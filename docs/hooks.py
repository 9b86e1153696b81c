"""What the site's pages need beyond what GitHub shows of the same files; mkdocs.yml names this file twice."""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# Pages that lie outside docs/: the file, and its title.
OUTSIDE = {"CHANGELOG.md": "Changelog", "CONTRIBUTING.md": "Contributing"}
# Where sections of the README are on the site.
README = {"weights": "models.md#weights", "deploy": "deploy.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the files that lie outside docs/ at the end of the navigation's last group."""
    assert config.nav is not None
    ((_, group),) = config.nav[-1].items()
    group += [{title: name.lower()} for name, title in OUTSIDE.items() if (ROOT / name).exists()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Makes pages of them."""
    for name in OUTSIDE:
        if (ROOT / name).exists():
            text = (ROOT / name).read_text(encoding="utf-8")
            files.append(File.generated(config, name.lower(), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes pictures follow the site's palette, and has links to other files of the repository lead somewhere."""
    uri = page.file.src_uri
    source = {name.lower(): name for name in OUTSIDE}.get(uri, f"docs/{uri}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        here = posixpath.dirname(uri)
        if path == "README.md":
            return f"[{text}]({posixpath.relpath(README.get(anchor or '', 'README.md'), here or '.')})"
        if path in OUTSIDE:
            page_of = path.lower()
        elif path.startswith("docs/"):
            page_of = path.removeprefix("docs/")
        else:
            page_of = ""
        if files.get_file_from_path(page_of):
            return f"[{text}]({posixpath.relpath(page_of, here or '.')}{f'#{anchor}' if anchor else ''})"
        if not (ROOT / path).exists():
            return match[0]  # which the validation of links reports
        repository = config.extra["repository"]
        return f"[{text}]({repository.rstrip('/')}/blob/HEAD/{path})" if repository else text

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    for i in range(0, len(parts), 2):  # what is not code
        parts[i] = re.sub(r"<picture>.*?</picture>", _picture, parts[i], flags=re.DOTALL)
        parts[i] = re.sub(r"(?<!!)\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(?:#([^)\s]*))?\)", link, parts[i])
        parts[i] = re.sub(r"^!\[(.+)\]\(.+\)$", _captioned, parts[i], flags=re.MULTILINE)
        parts[i] = re.sub(r"^( +)(?=- )", r"\1\1", parts[i], flags=re.MULTILINE)  # lists in lists: four, not two
        parts[i] = re.sub(r"^\|.*$", _together, parts[i], flags=re.MULTILINE)
    return "".join(parts)


def _together(row: re.Match[str]) -> str:
    """A row of a table whose numbers stay on one line with their units."""
    return re.sub(r"(?<=\d) (?=(?:M|MB|MiB|GiB|px|ms|s|%)(?!\w))", "\u00a0", row[0])


def _captioned(picture: re.Match[str]) -> str:
    """A picture above its alternative text, which one sees only so."""
    return f'<figure markdown="span">\n{picture[0]}\n<figcaption>{picture[1]}</figcaption>\n</figure>'


def _picture(match: re.Match[str]) -> str:
    """GitHub's pair of pictures as Material's, each a link to itself: on a phone it is small."""
    dark, alt, light = re.search(r'srcset="(.*?)".*?alt="(.*?)".*?src="(.*?)"', match[0], re.DOTALL).groups()  # type: ignore[union-attr]
    return "\n".join(f"[![{alt}]({file}#only-{scheme})]({file})" for scheme, file in (("light", light), ("dark", dark)))


class Paragraphs(griffe.Extension):
    """A docstring's lines that begin with `Source:`, `Cost:` or `Note:` become paragraphs."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of every object that has one."""
        if obj.docstring is not None:
            lines = re.sub(r"^(Source|Cost|Note): ", r"\n**\1:** ", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"(?<=\.) (Cost): ", r"\n\n**\1:** ", lines)
