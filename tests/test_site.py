"""The documentation: a page for every public name, docstrings as the signatures, no dead links."""
from __future__ import annotations

import importlib.util
import inspect
import json
import re
import zlib
from datetime import date
from pathlib import Path

import pytest
from pages import Page, broken_links, in_chromium, needs_chromium, read

import optcore
from optcore._state import STATE_VERSION
from optcore.checkpoint import FORMAT_VERSION
from optcore.kernels import ABI_VERSION

ROOT = Path(__file__).parent.parent

# What each module has for users; `None`: it says so itself, in __all__.
PUBLIC = {
    "optcore": None,
    "optcore.flower": None,
    "optcore.kernels": ("ABI_VERSION", "options_dtype", "make_options", "addresses", "functions"),
    "optcore.mpi": None,
    "optcore.sklearn": ("SGDOptimizer", "patched", "MLPClassifier", "MLPRegressor"),
    "optcore.torch": ("SGD",),
}
# Extra, and what its absence skips.
NEEDS = {"optcore.flower": "flwr", "optcore.mpi": "mpi4py", "optcore.sklearn": "sklearn",
         "optcore.torch": "torch"}


def public(module):
    """Return the module and the names of what it has for users."""
    if module in NEEDS:
        pytest.importorskip(NEEDS[module], reason=f"{module} needs {NEEDS[module]}")
    module = importlib.import_module(module)
    return module, PUBLIC[module.__name__] or module.__all__


def own_members(kind):
    """Return the public members of a class that optcore has made, by name.

    What a class has from `optcore.SGD` is documented there.
    """
    found = {}
    for name in dir(kind):
        home = next((base for base in kind.__mro__ if name in vars(base)), None)
        if name.startswith("_") or not home or not home.__module__.startswith("optcore."):
            continue
        member = vars(home)[name]
        theirs = type(member).__module__.startswith("sklearn.")     # which makes some by itself
        if not theirs and (kind is optcore.SGD or home not in optcore.SGD.__mro__):
            found[name] = member
    return found


def documented(module):
    """Yield the name and the object of everything that must be documented, members after theirs."""
    module, names = public(module)
    for name in names:
        thing = getattr(module, name)
        yield f"{module.__name__}.{name}", thing
        if inspect.isclass(thing):
            for member, value in own_members(thing).items():
                yield f"{module.__name__}.{name}.{member}", value


@pytest.fixture(scope="session")
def objects(site):
    """The places of all names of Python's, from the inventory that other sites link by."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = re.findall(r"^(\S+) py:\w+ \S+ (\S+) ", zlib.decompress(packed).decode(), re.MULTILINE)
    return {name: place.replace("$", name) for name, place in lines}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_its_place(module, site, objects):
    for name, _ in documented(module):
        assert name in objects, f"no page documents {name}"
        page, _, anchor = objects[name].partition("#")
        assert anchor in read((site / page).resolve()).ids


def sections(thing):
    """Return a docstring as numpydoc reads it, without the signature that Cython puts before it."""
    docscrape = pytest.importorskip("numpydoc.docscrape", reason="needs the extra 'docs'")
    text = inspect.getdoc(thing) or ""
    first, _, rest = text.partition("\n")
    return docscrape.NumpyDocString(rest if re.fullmatch(r"[\w.]+\(.*\)", first) else text)


def described(doc, section):
    return [name.strip() for entry in doc[section] for name in entry.name.split(",")]


def parameters(function):
    """Return the names that a caller may give, those of several as they are written in a call."""
    return [str(p.replace(annotation=p.empty, default=p.empty))
            for p in inspect.signature(function).parameters.values()
            if p.name not in ("self", "cls") and not p.name.startswith("_")]


@pytest.mark.parametrize("module", PUBLIC)
def test_docstrings_fit_what_they_document(module):
    """One line of summary, and every parameter of the signature, no other, in its order."""
    of_class = None
    for name, thing in documented(module):
        member = name.rpartition(".")[2]
        if isinstance(thing, classmethod):
            thing = thing.__func__
        if not (inspect.isroutine(thing) or inspect.isclass(thing) or hasattr(thing, "__get__")):
            continue        # plain data
        doc = sections(thing)
        if inspect.isclass(thing):
            of_class = doc
        elif of_class and member in described(of_class, "Attributes"):
            continue        # which the class describes
        assert len(doc["Summary"]) == 1, name
        assert doc["Summary"][0].endswith("."), name
        if inspect.isclass(thing):
            if getattr(thing.__init__, "__module__", "").startswith("optcore."):
                assert described(doc, "Parameters") == parameters(thing), name
        elif inspect.isroutine(thing):
            theirs = f"`optcore.SGD.{member}`"
            if described(doc, "Parameters") or theirs not in inspect.getdoc(thing):
                refused = doc["Summary"][0].startswith("Refuse: ")
                assert refused or described(doc, "Parameters") == parameters(thing), name
            else:       # the same as there, and said to be
                assert parameters(thing) == parameters(getattr(optcore.SGD, member)), name


def pages(site):
    return sorted(site.rglob("*.html"))


def test_no_link_leads_nowhere(site):
    assert len(pages(site)) > 25
    broken = {str(page.relative_to(site)): broken_links(page.resolve()) for page in pages(site)}
    assert not {page: links for page, links in broken.items() if links}


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<h1 id="here"></h1><a href="#here"></a><a href="#there"></a><img src="none.png">'
        '<a href="page.html#here"></a><a href="page.html#there"></a><a href="http://a.b/c"></a>'
    )
    assert broken_links(page) == ["#there", "none.png", "page.html#there"]


def test_links_to_the_repository_lead_to_pages(tmp_path, monkeypatch):
    pytest.importorskip("sphinx", reason="needs the extra 'docs'")
    spec = importlib.util.spec_from_file_location("conf", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    monkeypatch.setattr(conf, "ROOT", tmp_path)
    monkeypatch.setattr(conf, "DOCS", tmp_path / "docs")

    def led(text, folder):
        return conf.LINK.sub(lambda link: conf.led(link, folder), text)

    assert led("[log](../CHANGELOG.md)", tmp_path / "docs") == "[log](changelog.md)"
    assert led("[all](bench/results#x)", tmp_path) == "[all](results-engine.md#x)"
    assert led("[one](../examples/digits.py)", tmp_path / "docs") == "[one](examples.md#digitspy)"
    row = "a [row](../build/gallery/index.html#row-1)"
    assert led(row, tmp_path / "docs") == "a row"
    gallery = tmp_path / "build" / "gallery"
    gallery.mkdir(parents=True)
    (gallery / "index.html").write_text("a page")
    assert led(row, tmp_path / "docs") == 'a <a href="gallery/index.html#row-1">row</a>'
    for left in ("[no](../page.md)", "[far](https://a.b/c)", "[here](#there)", "`x[0](1)`"):
        assert led(left, tmp_path / "docs") == left


def test_pages_are_whole(site):
    for page in pages(site):
        found = read(page.resolve())
        assert len(found.ids) == len(set(found.ids)), page
        assert all(image.get("alt") for image in found.images), page
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(\w+:)?//',
                            page.read_text(encoding="utf-8"))
        assert not loaded, f"{page} is not whole without a network"


PROBE = """<script>
    const failed = [];
    addEventListener("error", e => failed.push(e.target.src || e.target.href || e.message), true);
    addEventListener("load", () => {
        const here = location.href.split("#")[0];
        const anchors = [...document.querySelectorAll("a[href]")].map(a => a.href)
            .filter(href => href.startsWith(here + "#") && href.length > here.length + 1)
            .map(href => decodeURIComponent(href.slice(here.length + 1)));
        document.title = JSON.stringify({
            failed,
            images: [...document.images].filter(i => !(i.complete && i.naturalWidth)).length,
            anchors: anchors.length,
            missing: anchors.filter(id => !document.getElementById(id)),
            wide: document.documentElement.scrollWidth > innerWidth,
        });
    });
</script>"""


@needs_chromium
@pytest.mark.parametrize("name", ["index", "performance", "api/sgd"])
def test_a_page_opens_from_a_file(site, tmp_path, name):
    page = site / f"{name}.html"
    probed = page.with_name(f"probe-{page.name}")
    probed.write_text(page.read_text(encoding="utf-8").replace("<head>", "<head>" + PROBE, 1),
                      encoding="utf-8")
    try:
        dumped = in_chromium(probed.as_uri(), tmp_path)
    finally:
        probed.unlink()
    seen = json.loads(re.search(r"<title>(.*?)</title>", dumped)[1].replace("&quot;", '"'))
    assert seen.pop("anchors") > 3
    assert seen == {"failed": [], "images": 0, "missing": [], "wide": False}


@needs_chromium
def test_the_search_box_finds_a_function(site, tmp_path):
    """What is typed into the box of the first page, and what it leads to."""
    probed = site / "probe-search.html"
    typed = """<script>addEventListener("load", () => {
        const box = document.querySelector("form[action='search.html'] input[name=q]");
        box.value = "nesterov_step"; box.form.submit(); })</script>"""
    page = (site / "index.html").read_text(encoding="utf-8")
    probed.write_text(page.replace("<head>", "<head>" + typed, 1), encoding="utf-8")
    try:
        results = Page(in_chromium(probed.as_uri(), tmp_path))
    finally:
        probed.unlink()
    assert any("api/functions.html" in link and "nesterov_step" in link for link in results.links)


def test_release_documents_have_one_version():
    """The package and the changelog's newest heading; the citation and the newest release."""
    headings = re.findall(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"),
                          re.MULTILINE)
    assert headings[0][0] == optcore.__version__
    cited = dict(re.findall(r"^([\w-]+): *\"?([^\"\n]*)\"?$",
                            (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE))
    cited = cited["version"], cited["date-released"]
    date.fromisoformat(cited[1])
    released = [heading for heading in headings if heading[1] != "unreleased"]
    assert not released or released[0] == cited


def test_the_policy_has_the_numbers_of_the_code():
    policy = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    numbers = {"`OPTCORE_ABI_VERSION`": ABI_VERSION, "`version`": STATE_VERSION,
               "`format_version`": FORMAT_VERSION}
    for name, number in numbers.items():
        assert f"{name} (now {number})" in policy
