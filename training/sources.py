"""Table of the text sources: which package, which files in it, which licence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One domain of the corpus and where its text comes from.

    ``kind`` is ``deb`` (Debian package), ``npm`` (npm package) or ``stdlib``
    (the running Python's own library).  For ``deb`` the first package of
    ``packages`` that the configured mirror has is used; for ``npm`` all of them.
    ``reader`` names a function of `readers.READERS`.
    """

    domain: str
    kind: str
    packages: tuple[str, ...]
    patterns: tuple[str, ...]
    licence: str
    reader: str = "plain"


JS_PACKAGES = ("lodash", "underscore", "express", "async", "jquery", "d3-array",
               "d3-geo", "d3-scale", "d3-shape", "mathjs", "mocha", "backbone")  # fmt: skip
CSS_PACKAGES = ("bootstrap", "bulma", "normalize.css", "spectre.css",
                "milligram", "water.css", "tachyons", "purecss")  # fmt: skip
MAN_LICENCE = "GPL-3.0-or-later (translation), free licence of each page"

SOURCES: tuple[Source, ...] = (
    Source("python", "stdlib", ("python",), ("*.py", "*/*.py"), "PSF-2.0"),
    Source("python_docs", "deb", ("python3.11-doc", "python3.13-doc", "python3.12-doc"),
           ("usr/share/doc/python3*/html/_sources/**/*.txt",), "PSF-2.0"),
    Source("c_headers", "deb", ("linux-libc-dev",), ("usr/include/**/*.h",),
           "GPL-2.0 WITH Linux-syscall-note"),
    Source("rust", "deb", ("rust-src",), ("usr/src/rustc*/library/**/*.rs",),
           "MIT OR Apache-2.0"),
    Source("go", "deb", ("golang-1.19-src", "golang-1.24-src", "golang-1.22-src"),
           ("usr/share/go-*/src/**/*.go",), "BSD-3-Clause"),
    Source("assembly", "deb", ("golang-1.19-src", "golang-1.24-src", "golang-1.22-src"),
           ("usr/share/go-*/src/**/*.s",), "BSD-3-Clause"),
    Source("javascript", "npm", JS_PACKAGES, ("package/**/*.js",),
           "MIT; d3-*: ISC; mathjs: Apache-2.0"),
    Source("css", "npm", CSS_PACKAGES, ("package/**/*.css",),
           "MIT; purecss: BSD-3-Clause"),
    Source("perl", "deb", ("perl-modules-5.36", "perl-modules-5.40"),
           ("usr/share/perl/**/*.p[lm]",), "Artistic-1.0-Perl OR GPL-1.0-or-later"),
    Source("erlang", "deb", ("erlang-src",), ("usr/lib/erlang/lib/**/*.erl",), "Apache-2.0"),
    Source("lisp", "deb", ("sbcl-source",), ("usr/share/sbcl-source/**/*.lisp",),
           "public domain / BSD-3-Clause"),
    Source("coq", "deb", ("libcoq-stdlib",), ("usr/lib/ocaml/coq/theories/**/*.v",),
           "LGPL-2.1-only"),
    Source("metamath", "deb", ("metamath-databases",),
           ("usr/share/metamath/databases/set.mm",), "CC0-1.0"),
    Source("html", "deb", ("sqlite3-doc",), ("usr/share/doc/sqlite3/**/*.html",),
           "public domain"),
    Source("json", "deb", ("iso-codes",), ("usr/share/iso-codes/json/*.json",),
           "LGPL-2.1-or-later"),
    Source("unicode_tables", "deb", ("unicode-data",), ("usr/share/unicode/**/*.txt",),
           "Unicode-DFS-2016"),
    Source("man_de", "deb", ("manpages-de",), ("usr/share/man/de/man*/*.gz",),
           MAN_LICENCE, "roff"),
    Source("man_fr", "deb", ("manpages-fr",), ("usr/share/man/fr/man*/*.gz",),
           MAN_LICENCE, "roff"),
    Source("man_es", "deb", ("manpages-es",), ("usr/share/man/es/man*/*.gz",),
           MAN_LICENCE, "roff"),
    Source("man_ja", "deb", ("manpages-ja",), ("usr/share/man/ja/man*/*.gz",),
           "free licence of each page (see the package)", "roff"),
    Source("man_ru", "deb", ("manpages-ru",), ("usr/share/man/ru/man*/*.gz",),
           MAN_LICENCE, "roff"),
    Source("man_zh", "deb", ("manpages-zh",), ("usr/share/man/zh_CN/man*/*.gz",),
           "GFDL-1.2-or-later / GPL-2.0-or-later", "roff"),
    Source("bible", "deb", ("sword-text-web",),
           ("usr/share/sword/modules/texts/ztext/*/*.bzz",), "public domain", "sword"),
    Source("jargon", "deb", ("dict-jargon",), ("usr/share/dictd/jargon.dict.dz",),
           "public domain"),
)  # fmt: skip
