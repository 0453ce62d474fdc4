"""From "module:attr" to a callable and its interface; the words of each way to fail."""

from __future__ import annotations

import functools
import itertools
import sys

import pytest

from prefork.errors import ImportFailed, LoadError, NoSuchAttribute, NoSuchModule
from prefork.gateway.load import Interface, load_application, resolve

numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module into the current directory, which is on the path; gives its name.

    Each gets a name of its own, because modules outlive a test.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(source, name=None):
        name = name or f"application_{next(numbers)}"
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        return name

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


# ---- names ----


def test_attribute_of_a_module_is_loaded(module):
    """The ordinary spelling."""
    name = module("async def handler(request): ...")
    application = load_application(f"{name}:handler")

    assert application.name == f"{name}:handler"
    assert application.target is sys.modules[name].handler
    assert (application.interface, application.guessed, application.reason) == (Interface.NATIVE, False, "")


def test_attribute_may_be_dotted(module):
    """Applications often hang on an object."""
    name = module("class site:\n    @staticmethod\n    def wsgi(environ, start_response): ...")

    assert load_application(f"{name}:site.wsgi").interface is Interface.WSGI


def test_module_may_be_dotted(module):
    """myproject.wsgi:application."""
    module("", "project_a/__init__".replace("/", "."))
    module("def application(environ, start_response): ...", "project_a.wsgi")

    assert load_application("project_a.wsgi:application").interface is Interface.WSGI


def test_factory_is_called_once(module):
    """`()` says so; nothing else is ever called."""
    name = module("calls = []\ndef make():\n    calls.append(1)\n    return lambda environ, start_response: []")

    assert load_application(f"{name}:make()").interface is Interface.WSGI
    assert sys.modules[name].calls == [1]


@pytest.mark.parametrize(
    ("source", "attribute"),
    [
        ("def app(request): ...\ndef application(request): ...\ndef handler(request): ...", "app"),
        ("def application(request): ...\ndef handler(request): ...", "application"),
        ("def handler(request): ...", "handler"),
    ],
)
def test_module_alone_has_a_customary_attribute(module, source, attribute):
    """In this order, and the name says which it was."""
    name = module(source)

    assert load_application(name).name == f"{name}:{attribute}"
    assert resolve(name) == (f"{name}:{attribute}", getattr(sys.modules[name], attribute))


def test_callable_is_taken_as_it_is():
    """`serve(handler)`."""

    def handler(request): ...

    application = load_application(handler)
    assert application.target is handler
    assert application.name.endswith("handler")


def test_path_is_left_alone(module):
    """What is importable is the caller's to say."""
    name = module("def app(request): ...")
    before = list(sys.path)
    load_application(name)

    assert sys.path == before


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("", "'' cannot be understood, expected 'module:attribute', 'module:factory\\(\\)' or 'module'"),
        (":app", "cannot be understood"),
        ("a:", "cannot be understood"),
        ("a:b:c", "cannot be understood"),
        ("a b", "cannot be understood"),
        ("a..b:c", "cannot be understood"),
        ("a:make(1)", "a factory is called without arguments"),
        ("app.py:handler", "names a file, .* write 'app:handler'"),
        ("./site/app.py", "names a file, .* write 'site.app'"),
        ("site/app:handler", "names a file, .* write 'site.app:handler'"),
    ],
)
def test_name_that_cannot_be_understood_is_refused_with_the_right_one(target, complaint):
    """Most are a file's name."""
    with pytest.raises(LoadError, match=complaint):
        load_application(target)


def test_unknown_interface_is_refused_with_the_known_ones():
    """Also for those who call us without a command line."""
    with pytest.raises(LoadError, match="interface 'rsgi' is unknown, allowed are auto, native, asgi and wsgi"):
        load_application(lambda request: None, "rsgi")


# ---- no such module ----


def test_missing_module_names_the_places_and_the_near_ones(module, tmp_path):
    """The first mistake of everybody: the wrong directory, or a slip of the pen."""
    module("", "mainly")
    with pytest.raises(NoSuchModule) as error:
        load_application("mainyl:app")

    assert str(error.value) == (
        f"no module 'mainyl' (for 'mainyl:app'): it is looked for in the current directory ({tmp_path}; --chdir "
        f"changes it), in --pythonpath and among the packages of {sys.prefix}; did you mean 'mainly'?"
    )


def test_missing_parent_is_named_itself(module):
    """ "No module 'shop.wsgi'" would send people looking in a package that is not there."""
    with pytest.raises(NoSuchModule, match="no module 'no_such_shop' \\(for 'no_such_shop.wsgi:app'\\)"):
        load_application("no_such_shop.wsgi:app")


def test_missing_part_of_a_package_names_the_package_and_the_near_ones(module):
    """The current directory has no part in it."""
    module("", "shop_a.__init__")
    module("", "shop_a.wsgi")
    with pytest.raises(NoSuchModule) as error:
        load_application("shop_a.wsgy:app")

    assert str(error.value) == (
        "no module 'shop_a.wsgy' (for 'shop_a.wsgy:app'): it is looked for in the package 'shop_a'; did you mean 'wsgi'?"
    )


def test_module_that_is_no_package_is_told_apart(module):
    """A dot where a colon belongs."""
    name = module("def app(request): ...")
    with pytest.raises(NoSuchModule, match=f"no module '{name}.app' .*: '{name}' is a module, not a package"):
        load_application(f"{name}.app")


# ---- the module fails ----


def test_module_that_imports_something_missing_failed_itself(module):
    """It was found: "no such module" would be a lie. It is the difference this file is about."""
    name = module("import no_such_dependency")
    with pytest.raises(ImportFailed) as error:
        load_application(f"{name}:app")

    assert str(error.value) == (
        f"module '{name}' was found, but importing it failed: ModuleNotFoundError: No module named 'no_such_dependency'"
    )


def test_package_that_imports_a_missing_part_of_its_own_failed_itself(module):
    """The missing name is the very one that was asked for, and still the application's mistake."""
    module("import shop_b.wsgi", "shop_b.__init__")
    with pytest.raises(ImportFailed, match="module 'shop_b.wsgi' was found, but importing it failed"):
        load_application("shop_b.wsgi:app")


def test_traceback_of_a_failed_import_starts_with_the_application(module):
    """Neither our frames nor importlib's help anybody."""
    helper = module("def fail():\n    raise KeyError('boom')")
    name = module(f"import {helper}\n{helper}.fail()")
    with pytest.raises(ImportFailed, match="KeyError: 'boom'") as error:
        load_application(f"{name}:app")

    lines = error.value.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1].endswith(f'{name}.py", line 2, in <module>')
    assert "importlib" not in error.value.traceback
    assert "gateway" not in error.value.traceback


def test_syntax_error_in_the_module_names_its_line(module):
    """No frame of the application ran, so the error itself must say where."""
    name = module("def app(:\n")
    with pytest.raises(ImportFailed, match="SyntaxError") as error:
        load_application(name)

    assert f'{name}.py", line 1' in error.value.traceback
    assert "importlib" not in error.value.traceback


def test_module_that_exits_failed_to_import(module):
    """A script without `if __name__ == "__main__"` would end the server without a word."""
    name = module("import sys\nsys.exit('usage: ...')")
    with pytest.raises(ImportFailed, match="SystemExit: usage"):
        load_application(name)


def test_factory_that_fails_is_reported_like_an_import(module):
    """With the application's traceback."""
    name = module("def make():\n    return 1 / 0")
    with pytest.raises(ImportFailed, match=f"factory '{name}:make\\(\\)' failed: ZeroDivisionError") as error:
        load_application(f"{name}:make()")

    assert "gateway" not in error.value.traceback


def test_async_factory_is_refused(module):
    """There is no loop yet, and another one later."""
    name = module("async def make(): ...")
    with pytest.raises(LoadError, match="is async"):
        load_application(f"{name}:make()")


# ---- no such attribute ----


def test_missing_attribute_names_the_file_and_the_near_ones(module, tmp_path):
    """The file tells when another module of that name was found first."""
    name = module("def handler(request): ...")
    with pytest.raises(NoSuchAttribute) as error:
        load_application(f"{name}:handlr")

    assert str(error.value) == (
        f"module '{name}' ({tmp_path / name}.py) has no attribute 'handlr' (for '{name}:handlr'); "
        f"did you mean 'handler'?"
    )


def test_missing_attribute_without_a_near_one_tells_what_there_is(module):
    """What the module defines comes before what it imports."""
    name = module("from json import dumps\ndef zebra(request): ...")
    with pytest.raises(NoSuchAttribute, match="; it has 'zebra', 'dumps'$"):
        load_application(f"{name}:app")


def test_missing_attribute_of_an_object_names_the_object(module):
    """Not the module, which has what was asked of it."""
    name = module("class Site:\n    def application(self, environ, start_response): ...\nsite = Site()")
    with pytest.raises(NoSuchAttribute, match=f"'{name}:site' \\(of type Site\\) has no attribute 'aplication'"):
        load_application(f"{name}:site.aplication")


def test_module_without_a_customary_attribute_tells_which_were_tried(module):
    """And how to name another."""
    name = module("def zebra(request): ...")
    with pytest.raises(NoSuchAttribute, match=f"has none of 'app', 'application', 'handler': .*'{name}:name'.*'zebra'"):
        load_application(name)


def test_directory_without_init_is_recognised(module, tmp_path):
    """Python imports it happily, and empty."""
    (tmp_path / "bare_directory").mkdir()
    with pytest.raises(NoSuchAttribute, match="'bare_directory' \\(a directory without __init__.py\\)"):
        load_application("bare_directory:app")


# ---- interfaces ----


async def native(request): ...
async def native_with_default(request, retries=1): ...
def plain(request): ...
def plain_of_another_name(req, *, retries=3): ...
async def asgi(scope, receive, send): ...
async def asgi_of_other_names(s, r, w): ...
def asgi_with_defaults(scope, receive=None, send=None): ...
def wsgi(environ, start_response): ...
def wsgi_of_other_names(env, start): ...
def wsgi_with_default(environ, start_response, debug=False): ...
def request_and_more(request, *args, **kwargs): ...


async def with_configuration(settings, scope, receive, send): ...


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class AsyncFramework:
    """FastAPI, Starlette, Litestar, Quart, Django's ASGIHandler, Falcon's asgi.App."""

    async def __call__(self, scope, receive, send): ...


class SyncFramework:
    """Flask, Bottle, Django's WSGIHandler, Pyramid's Router."""

    def __call__(self, environ, start_response): ...

    def wsgi_app(self, environ, start_response): ...


class FalconLike:
    """falcon.App."""

    def __call__(self, env, start_response): ...


class NativeObject:
    async def __call__(self, request): ...


class Endpoint:
    """Starlette's HTTPEndpoint: the class is the application, its instance is awaited."""

    def __init__(self, scope, receive, send): ...

    def __await__(self):
        yield


class IterableWsgi:
    """PEP 3333's AppClass."""

    def __init__(self, environ, start_response): ...

    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("target", "interface"),
    [
        (native, Interface.NATIVE),
        (native_with_default, Interface.NATIVE),
        (plain, Interface.NATIVE),
        (plain_of_another_name, Interface.NATIVE),
        (request_and_more, Interface.NATIVE),
        (lambda request: None, Interface.NATIVE),
        (NativeObject(), Interface.NATIVE),
        (functools.partial(lambda database, request: None, 1), Interface.NATIVE),
        (decorated(native), Interface.NATIVE),
        (asgi, Interface.ASGI),
        (asgi_of_other_names, Interface.ASGI),
        (asgi_with_defaults, Interface.ASGI),
        (AsyncFramework(), Interface.ASGI),
        (AsyncFramework().__call__, Interface.ASGI),
        (functools.partial(with_configuration, {}), Interface.ASGI),
        (decorated(asgi), Interface.ASGI),
        (Endpoint, Interface.ASGI),
        (wsgi, Interface.WSGI),
        (wsgi_of_other_names, Interface.WSGI),
        (wsgi_with_default, Interface.WSGI),
        (SyncFramework(), Interface.WSGI),
        (SyncFramework().wsgi_app, Interface.WSGI),
        (FalconLike(), Interface.WSGI),
        (decorated(wsgi), Interface.WSGI),
        (IterableWsgi, Interface.WSGI),
    ],
)
def test_interface_is_read_from_the_signature(target, interface):
    """Everything the frameworks do; nothing of it is a guess."""
    application = load_application(target)

    assert (application.interface, application.guessed) == (interface, False)


def open_sync(*args, **kwargs): ...
async def open_async(*args, **kwargs): ...


class OpenAsync:
    async def __call__(self, *args): ...


class WebObLike:
    """webob.dec.wsgify: takes a request or WSGI's two."""

    def __call__(self, req, *args, **kw): ...


@pytest.mark.parametrize(
    ("target", "interface", "reason"),
    [
        (open_sync, Interface.WSGI, "its signature (*args) takes any number of arguments and it is no coroutine function"),
        (open_async, Interface.ASGI, "its signature (*args) takes any number of arguments and it is a coroutine function"),
        (OpenAsync(), Interface.ASGI, "its signature (*args) takes any number of arguments and it is a coroutine function"),
        (WebObLike(), Interface.WSGI, "its signature (req, *args) takes any number of arguments and it is no coroutine function"),
        (max, Interface.WSGI, "its signature cannot be read and it is no coroutine function"),
    ],
)  # fmt: skip
def test_signature_that_does_not_tell_is_guessed_and_says_how(target, interface, reason):
    """The log line is what leads to --interface."""
    application = load_application(target)

    assert (application.interface, application.guessed, application.reason) == (interface, True, reason)


@pytest.mark.parametrize("interface", list(Interface))
def test_interface_that_is_given_overrides(interface):
    """Whatever the signature says."""
    application = load_application(open_sync, interface.value)

    assert (application.interface, application.guessed) == (interface, False)


class AsgiTwo:
    def __init__(self, scope): ...

    async def __call__(self, receive, send): ...


def asgi_two(scope): ...


@pytest.mark.parametrize("interface", ["auto", "asgi"])
@pytest.mark.parametrize("target", [AsgiTwo, asgi_two])
def test_asgi_2_is_refused_with_the_way_out(target, interface):
    """It would fail at each request, and look like a native handler."""
    with pytest.raises(LoadError, match="ASGI 2 .* asgiref.compatibility.guarantee_single_callable"):
        load_application(target, interface)


async def two_but_async(a, b): ...
def four(a, b, c, d): ...
def keyword_only(*, request): ...


@pytest.mark.parametrize("target", [two_but_async, four, keyword_only])
def test_signature_that_fits_nothing_is_refused_with_those_that_do(target):
    """Better at boot than at each request."""
    with pytest.raises(LoadError, match=r"takes .* expected handler\(request\), async app\(scope, receive, send\)"):
        load_application(target)


def test_factory_without_its_parentheses_is_recognised(module):
    """`app:create_app` is what people type first."""
    name = module("def create_app(): ...")
    with pytest.raises(
        LoadError, match=f"takes no arguments.* if it makes the application, write '{name}:create_app\\(\\)'"
    ):
        load_application(f"{name}:create_app")


@pytest.mark.parametrize("target", [AsyncFramework, SyncFramework, NativeObject])
def test_class_in_place_of_its_instance_is_refused(target):
    """`app:Flask`."""
    with pytest.raises(LoadError, match=f"is the class {target.__name__}, an instance of it was expected"):
        load_application(target)


def test_value_that_cannot_be_called_is_refused_with_its_type(module):
    """A name that is taken by something else."""
    name = module("app = {}\nimport json as sub\nnothing = None")

    with pytest.raises(LoadError, match=f"^'{name}:app' is of type dict, a callable was expected$"):
        load_application(name)
    with pytest.raises(LoadError, match="is None, a callable was expected"):
        load_application(f"{name}:nothing")
    with pytest.raises(LoadError, match="is of type module, .* name an attribute of it, as in 'json:app'"):
        load_application(f"{name}:sub")
    with pytest.raises(LoadError, match="^the application is of type int, a callable was expected$"):
        load_application(3)


def test_coroutine_in_place_of_its_function_is_refused():
    """`serve(handler())`."""
    with pytest.raises(LoadError, match="of type coroutine, .*: the function itself is served, not its call"):
        load_application(native(None))
