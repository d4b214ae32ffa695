"""The options: one table, every kind of number, schedules, values that change in their place."""
from __future__ import annotations

import ast
import copy
import inspect
import itertools
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import optcore
from optcore import checkpoint, kernels
from optcore.options import CHOICES as ALL_CHOICES
from optcore.options import FAMILIES, KERNEL_OPTIONS, OPTIMIZER_OPTIONS, REFUSALS
from optcore.options import OPTIONS as ALL_OPTIONS
from reference import LINEAR, RULES_BY_ID, SGD_OPTIONS, Options, averaged, same_bits

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is missing")

PACKAGE = Path(optcore.__file__).parent
FUNCTIONS = {
    "sgd": optcore.sgd_step, "momentum": optcore.momentum_step, "nesterov": optcore.nesterov_step,
}
# SGD's, whose tests these are; what others have besides is in test_adaptive.py
OPTIONS = {name: row for name, row in ALL_OPTIONS.items() if "sgd" in row.families}
CHOICES = {name: values for name, values in ALL_CHOICES.items() if name in OPTIONS}
FLAGS = [name for name, row in OPTIONS.items() if row.default is False]
INTEGERS = [name for name, row in OPTIONS.items() if row.range == OPTIONS["seed"].range]
NUMBERS = [name for name in OPTIONS if name not in (*FLAGS, *INTEGERS, *CHOICES)]
OPTIONAL = [name for name in NUMBERS if OPTIONS[name].default is None and name != "lr"]
SCHEDULED = [name for name in NUMBERS if name in SGD_OPTIONS]
FRACTIONS = [name for name in NUMBERS
             if OPTIONS[name].range in (OPTIONS["momentum"].range, OPTIONS["dampening"].range)]
# SGD gives these by itself, from the step it takes
NOT_OF_SGD = ["grad_scale", "first_step", "noise_key", "first_element", "stochastic"]


def same_value(a, b):
    """Whether two defaults are the same; 0 and False are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def contents(opt):
    """Everything that an optimizer holds, with its parameters, as something to compare."""
    return checkpoint.digest(*checkpoint.split(opt._contents(include_params=True)))


def draw(rng, dtype=np.float64, shapes=((7,), (3, 5), ())):
    return [np.array(rng.standard_normal(shape), dtype) for shape in shapes]


# The table is the only list

def test_the_table_is_whole():
    assert {**SGD_OPTIONS, **OPTIMIZER_OPTIONS}.keys() | set(NOT_OF_SGD) == OPTIONS.keys()
    assert [name for name, row in OPTIONS.items() if row.holder == "call"] == NOT_OF_SGD
    offsets = [row.offset for row in ALL_OPTIONS.values()]
    assert offsets == sorted(set(offsets))
    assert list(ALL_OPTIONS)[: len(KERNEL_OPTIONS)] == list(KERNEL_OPTIONS)
    assert list(ALL_OPTIONS) == [row.name for row in ALL_OPTIONS.values()]
    for row in ALL_OPTIONS.values():
        if row.holder == "optimizer":
            assert row.families == FAMILIES, "every optimizer has it"


def type_of(name, flag="int", integer="uint64_t", number="double"):
    row = ALL_OPTIONS[name]
    if row.default is False:
        return flag
    return integer if row.range == ALL_OPTIONS["seed"].range else number


def fields(text):
    """Return type, name and comment of each field of optcore_options in C or Cython."""
    found = re.findall(r"^ +(\w+) (\w+);? +(?:/\*|#) (.*?)(?: \*/)?$", text, re.MULTILINE)
    assert found[0][:2] == ("size_t", "size")
    return found[1:]


@pytest.mark.parametrize(("file", "pattern", "flag_type"), [
    ("include/optcore.h", r"typedef struct optcore_options \{\n(.*?)\n\} optcore_options;", "int"),
    ("kernels.pxd", r"ctypedef struct optcore_options:\n(.*?)\n\n", "bint"),
])
def test_c_fields(file, pattern, flag_type):
    """Those of the table, in its order, with its defaults in their comments."""
    folder = Path(optcore.get_include()).parent
    assert folder == PACKAGE
    found = fields(re.search(pattern, (folder / file).read_text(), re.DOTALL)[1])
    assert [(kind, name) for kind, name, _ in found] == [
        (type_of(name, flag_type), name) for name in KERNEL_OPTIONS
    ]
    for _, name, comment in found:
        default = 0.0 if name == "lr" else ALL_OPTIONS[name].default
        stated = float(re.match(r"[\w.-]+", comment)[0])
        assert stated == (np.inf if default is None else default), name


def test_the_struct_of_numpy_and_its_defaults():
    dtype, made = kernels.options_dtype, kernels.make_options()[0]
    assert dtype.names == ("size", *KERNEL_OPTIONS)
    for name, row in KERNEL_OPTIONS.items():
        kind = type_of(name, np.intc, np.uint64, np.double)
        assert dtype.fields[name] == (np.dtype(kind), row.offset)
        default = 0 if name == "lr" else row.default
        assert made[name] == (np.inf if default is None else default)
    assert made["size"] == dtype.itemsize


@pytest.mark.parametrize("name", [*ALL_OPTIONS, "size", "learning_rate"])
def test_make_options_takes_the_kernels_options(name):
    if name in KERNEL_OPTIONS:
        value = type_of(name, True, 3, 0.25)
        assert kernels.make_options(**{name: value})[0][name] == value
    else:
        with pytest.raises(TypeError, match=f"{', '.join(KERNEL_OPTIONS)}.*got '{name}'"):
            kernels.make_options(**{name: 1})


def python_signatures():
    yield "SGD", optcore.SGD.__init__, optcore.SGD, [*SGD_OPTIONS, *OPTIMIZER_OPTIONS]
    own = ["lr", "weight_decay", "decoupled_weight_decay", "maximize", "grad_scale", "clip_value",
           "rounding", "noise_key"]
    yield "sgd_step", optcore.sgd_step, optcore.sgd_step, own
    own = [*own, "momentum", "lr_in_velocity", "flush_subnormals"]
    yield "nesterov_step", optcore.nesterov_step, optcore.nesterov_step, own
    momentum = optcore.momentum_step
    own = [*own, "dampening", "first_step", "dampen_first"]
    yield "momentum_step", momentum, momentum, own


def default_of(name):
    """Return the default in a function, where some must be said."""
    return None if name in ("first_step", "rounding", "noise_key") else OPTIONS[name].default


def check_signature(function, expected, of=default_of):
    """Compare the options that a function takes, and their defaults, with the table's."""
    parameters = inspect.signature(function).parameters
    taken = {name: parameter.default for name, parameter in parameters.items() if name in OPTIONS}
    assert sorted(taken) == sorted(expected)
    for name, default in taken.items():
        if default is not inspect.Parameter.empty:
            assert same_value(default, of(name)), name
    return {name for name in taken if taken[name] is inspect.Parameter.empty}


SIGNATURES = [pytest.param(*row[1:], id=row[0]) for row in python_signatures()]


@pytest.mark.parametrize(("function", "documented", "options"), SIGNATURES)
def test_signatures(function, documented, options):
    required = check_signature(
        function, options, default_of if function in FUNCTIONS.values() else
        lambda name: OPTIONS[name].default)
    # nothing to fall back on; SGD's lr may stand in every group instead
    assert required == ({"lr", "momentum"} & set(options) if function in FUNCTIONS.values()
                        else set())


@needs_torch
def test_signature_of_the_torch_adapter():
    from optcore.torch import SGD

    # the norm is tracked by max_norm alone, and lr has PyTorch's default
    options = [name for name in (*SGD_OPTIONS, *OPTIMIZER_OPTIONS) if name != "track_grad_norm"]

    def without_lr(self, momentum=0, *args, **kwargs): ...

    signature = inspect.signature(SGD.__init__)
    without_lr.__signature__ = signature.replace(parameters=[
        p for name, p in signature.parameters.items() if name != "lr"
    ])
    assert signature.parameters["lr"].default == 1e-3
    assert not check_signature(without_lr, [name for name in options if name != "lr"],
                               lambda name: OPTIONS[name].default)
    assert documented_options(SGD).keys() == set(options)


def documented_options(thing, known=OPTIONS):
    """Return the options in a docstring's list of parameters, with the rest of their line."""
    section = inspect.getdoc(thing).split("Parameters\n----------\n")[1]
    section = re.split(r"\n\w+\n-+\n", section)[0]
    return {
        name: rest
        for names, rest in re.findall(r"^(\w+(?:, \w+)*)(?: : (.*))?$", section, re.MULTILINE)
        for name in names.split(", ") if name in known
    }


@pytest.mark.parametrize(("function", "documented", "options"), SIGNATURES)
def test_docstrings(function, documented, options):
    """Each option has its entry, and the default that it states is the table's."""
    found = documented_options(documented)
    assert sorted(found) == sorted(options)
    parameters = inspect.signature(function).parameters
    for name, text in found.items():
        stated = re.search(r"default ([\w\"]+)$", text)
        if stated:
            assert same_value(ast.literal_eval(stated[1]), OPTIONS[name].default), name
        elif text.endswith("optional"):
            assert default_of(name) is None
        elif text:
            assert parameters[name].default is inspect.Parameter.empty or name == "lr"


def stub(file):
    """Return the functions and classes of a stub by name."""
    return {node.name: node for node in ast.parse((PACKAGE / file).read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def stubbed_options(node):
    """Return the keywords of a function in a stub and their defaults, the source's words."""
    return {
        argument.arg: None if default is None else ast.unparse(default)
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_stubs_of_functions(name):
    found = stubbed_options(stub("functional.pyi")[f"{name}_step"])
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert list(found) == [name for name in parameters if name in OPTIONS]
    for option, default in found.items():
        if default is None:
            assert parameters[option].default is inspect.Parameter.empty
        else:
            assert same_value(ast.literal_eval(default), default_of(option)), option


def test_stub_of_make_options():
    found = stubbed_options(stub("kernels.pyi")["make_options"])
    assert list(found) == list(KERNEL_OPTIONS)
    for name, default in found.items():
        if name in OPTIONAL:            # infinity has no literal
            assert default == "..."
        else:
            expected = 0.0 if name == "lr" else ALL_OPTIONS[name].default
            assert same_value(ast.literal_eval(default), expected), name


def test_stub_of_the_plan():
    plan = stub("plan.pyi")["Plan"]
    functions = [node for node in plan.body if isinstance(node, ast.FunctionDef)]
    decorators = {(node.name, ast.unparse(decorator))
                  for node in functions for decorator in node.decorator_list}
    for name in OPTIMIZER_OPTIONS:
        assert {(name, "property"), (name, f"{name}.setter")} <= decorators
        assert isinstance(getattr(optcore.SGD, name), type(optcore.SGD.max_norm))
    assert not {name for name, _ in decorators} & SGD_OPTIONS.keys()
    for node in functions:
        if node.name in ("step", "step_replicas"):
            found = {name: default for name, default in stubbed_options(node).items()
                     if name in OPTIONS}
            assert {name: ast.literal_eval(default) for name, default in found.items()} == {
                "grad_scale": OPTIONS["grad_scale"].default
            }


def test_stub_of_the_table():
    row = stub("options.pyi")["Option"]
    assert [node.target.id for node in row.body] == list(OPTIONS["lr"]._fields)


def test_groups_hold_the_group_options():
    opt = optcore.SGD(np.ones(3), lr=0.25)
    group = opt.param_groups[0]
    assert group.keys() == SGD_OPTIONS.keys() | {"params", "param_names"}
    saved = opt.state_dict()["param_groups"][0]
    assert saved.keys() == SGD_OPTIONS.keys() | {"params", "param_names", "schedules"}
    for name, default in {**SGD_OPTIONS, "lr": 0.25}.items():
        assert same_value(saved[name], default)
        assert same_value(group[name], default)
    for name, default in OPTIMIZER_OPTIONS.items():
        assert same_value(getattr(opt, name), default)
    assert opt._contents(include_params=False)["options"].keys() == OPTIMIZER_OPTIONS.keys()


# Numbers

class Trial:
    """Arrays, and maybe an optimizer over them, for one number given in one way."""

    def __init__(self):
        rng = np.random.default_rng(3)
        self.x, self.g, self.v = (rng.standard_normal(17) for _ in range(3))
        self.opt = None
        self.before = self.seen()       # the call that may be refused

    def build(self, **options):
        self.opt = optcore.SGD(self.x, **{"lr": 0.5, "momentum": 0.5, **options})
        return self.opt

    def seen(self):
        """All that a step may change."""
        arrays = [self.x, self.g, self.v]
        counts = ()
        if self.opt is not None:
            arrays += [array for entry in self.opt._state for array in entry.values()
                       if isinstance(array, np.ndarray)]
            counts = (self.opt.step_count, self.opt.skipped, self.opt.max_norm, self.opt.ema_decay)
        return [array.tobytes() for array in arrays], counts


def by_function(rule):
    def use(trial, name, value):
        arrays = [trial.x, trial.g, trial.v][: 2 + len(RULES_BY_ID[rule].states)]
        scalars = {"lr": 0.5, **dict.fromkeys(RULES_BY_ID[rule].scalars, 0.5)}
        if name == "dampening":
            scalars["first_step"] = False
        FUNCTIONS[rule](*arrays, **{**scalars, name: value})

    return use, [name for name in NUMBERS if name in inspect.signature(FUNCTIONS[rule]).parameters]


def by_construction(trial, name, value):
    opt = trial.build(**{name: value})
    for _ in range(2):      # an average is the parameters at first, dampening starts late
        opt.step(trial.g)


def by_group_at_construction(trial, name, value):
    group = {"params": [trial.x], name: value}
    opt = trial.opt = optcore.SGD([group], lr=0.5, momentum=0.5)
    for _ in range(2):
        opt.step([trial.g])


def prepared(use):
    """Give `use` an optimizer that has stepped, with an average where its decay is to be set."""
    def prepare(trial, name, value):
        trial.build(**({"ema_decay": 0.5} if name == "ema_decay" else {})).step(trial.g)
        trial.before = trial.seen()
        use(trial, name, value)

    return prepare


@prepared
def by_edit(trial, name, value):
    trial.opt.param_groups[0][name] = value
    trial.opt.step(trial.g)


@prepared
def by_setter(trial, name, value):
    setattr(trial.opt, name, value)
    trial.opt.step(trial.g)


@prepared
def by_step(trial, name, value):
    trial.opt.step(trial.g, **{name: value})


@prepared
def by_replicas(trial, name, value):
    trial.opt.step_replicas([trial.g, trial.v], **{name: value})


OF_OPTIMIZER = [name for name in NUMBERS if name in OPTIMIZER_OPTIONS]
WAYS = {
    **{f"{rule}_step": by_function(rule) for rule in FUNCTIONS},
    "SGD": (by_construction, SCHEDULED + OF_OPTIMIZER),
    "group": (by_group_at_construction, SCHEDULED),
    "edit": (by_edit, SCHEDULED),
    "setter": (by_setter, OF_OPTIMIZER),
    "step": (by_step, ["grad_scale"]),
    "step_replicas": (by_replicas, ["grad_scale"]),
}
USES = [pytest.param(use, name, id=f"{way}-{name}")
        for way, (use, names) in WAYS.items() for name in names]


class Own:
    """What another library may call a number."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


class Index(int):
    pass


def kinds_of_numbers():
    """Yield numbers in (0, 1), or whole ones, each with the float it is."""
    yield "float", 0.3, 0.3
    yield "float16", np.float16(0.3), float(np.float16(0.3))
    yield "float32", np.float32(0.3), float(np.float32(0.3))
    yield "float64", np.float64(0.3), 0.3
    yield "longdouble", np.longdouble(0.3), 0.3
    yield "Fraction", Fraction(3, 10), 0.3
    yield "Decimal", Decimal("0.3"), 0.3
    yield "array0", np.array(0.3), 0.3
    yield "array1", np.array([0.3]), 0.3
    yield "array3", np.array([[[0.3]]], np.float32), float(np.float32(0.3))
    yield "array-object", np.array(Fraction(3, 10), object), 0.3
    yield "own", Own(0.3), 0.3
    yield "int", 2, 2.0
    yield "int-subclass", Index(2), 2.0
    yield "int64", np.int64(2), 2.0
    yield "uint8", np.uint8(2), 2.0
    yield "array-int", np.array(2), 2.0
    if torch is not None:
        yield "tensor0", torch.tensor(0.3, dtype=torch.float64), 0.3
        yield "tensor1", torch.tensor([0.3]), float(np.float32(0.3))
        yield "tensor-int", torch.tensor(2), 2.0


def whole_within(name, value, number):
    """Return a whole number as 0 where the option is less than 1."""
    return (type(value)(0) if isinstance(value, (int, np.integer)) else value * 0, 0.0) if (
        name in FRACTIONS and number == 2
    ) else (value, number)


@pytest.mark.parametrize(("use", "name"), USES)
def test_kinds_of_numbers(use, name):
    for kind, *row in kinds_of_numbers():
        value, number = whole_within(name, *row)
        given, plain = Trial(), Trial()
        use(given, name, value)
        use(plain, name, number)
        assert given.seen() == plain.seen(), kind


@pytest.mark.parametrize(("use", "name"), USES)
def test_the_number_matters(use, name):
    """Else nothing above would have shown."""
    one, other = Trial(), Trial()
    use(one, name, 0.3)
    use(other, name, np.array(0.25))
    assert one.seen() != other.seen()


class Broken:
    def __float__(self):
        raise ValueError("no number today")


class Wrong:
    def __float__(self):
        return "0.25"


class Complex:
    def __complex__(self):
        return 0.25j


def kinds_refused():
    yield from [
        ("True", True), ("bool_", np.True_), ("array-bool", np.array(True)),
        ("array-bool1", np.array([True])), ("array-object-bool", np.array(True, object)),
        ("str", "0.25"), ("str_", np.str_("0.25")), ("bytes", b"1"), ("bytes_", np.bytes_(b"1")),
        ("array-str", np.array("0.25")), ("array-bytes", np.array(b"1")),
        ("array-object-str", np.array("0.25", object)),
        ("array-None", np.array(None)), ("list", [0.25]), ("tuple", (0.25,)), ("dict", {}),
        ("array2", np.array([0.25, 0.5])), ("array-empty", np.array([])),
        ("complex", 0.25j), ("complex-real", 0.25 + 0j), ("complex64", np.complex64(0.25)),
        ("array-complex", np.array(0.25j)), ("array-complex1", np.array([0.25 + 0j])),
        ("class", float), ("class-own", Own), ("raises", Broken()), ("wrong", Wrong()),
        ("own-complex", Complex()), ("object", object()), ("void", np.array((0.25,), "f8,")[()]),
        ("timedelta", np.timedelta64(0, "ns")), ("array-timedelta", np.array(0, "m8[ns]")),
        ("timedelta-s", np.timedelta64(0, "s")), ("timedelta-plain", np.timedelta64(0)),
        ("datetime", np.datetime64(0, "ns")), ("array-datetime", np.array(0, "M8[ns]")),
    ]
    if torch is not None:
        yield "tensor-bool", torch.tensor(True)
        yield "tensor2", torch.tensor([0.25, 0.5])
        yield "tensor-empty", torch.tensor([])
        yield "tensor-complex", torch.tensor(0.25j)


def refusal(use, trial, name, value):
    try:
        use(trial, name, value)
    except TypeError as error:
        return str(error)
    return "taken"


def assert_refused(use, name, value, kind=None):
    trial = Trial()
    message = refusal(use, trial, name, value)
    assert message.startswith(f"{name} must be"), kind
    assert f"got {value!r}" in message, kind
    assert trial.seen() == trial.before, kind


@pytest.mark.parametrize(("use", "name"), USES)
def test_kinds_refused(use, name):
    for kind, value in kinds_refused():
        assert_refused(use, name, value, kind)


@pytest.mark.parametrize("value", [np.ma.masked, np.ma.array(0.25, mask=True)],
                         ids=["masked", "masked-array"])
def test_a_masked_element_is_no_number(value):
    """What lies under a mask is meaningless; NumPy hands it out all the same."""
    for use in (by_function("sgd")[0], by_construction, by_edit):
        assert_refused(use, "lr", value)


@pytest.mark.parametrize(("use", "name"), USES)
def test_none_is_no_number_but_where_it_means_none(use, name):
    if name not in OPTIONAL:
        assert_refused(use, name, None)
        return
    given, left_out = Trial(), Trial()
    if use is by_setter and name == "ema_decay":
        with pytest.raises(ValueError, match="ema_decay cannot be None once an average is kept"):
            use(given, name, None)
        assert given.seen() == given.before
        return
    use(given, name, None)
    use(left_out, "lr", 0.5) if use is not by_setter else use(left_out, name, None)
    assert given.seen() == left_out.seen()


@pytest.mark.parametrize(("use", "name"), [
    row for row in USES
    if (row.values[0] not in (by_construction, by_group_at_construction, by_edit)
    and row.values[1] != "ema_decay") or row.values == (by_construction, "max_norm")
])
def test_schedules_are_for_groups_and_averages(use, name):
    assert_refused(use, name, lambda step: 0.25)


@pytest.mark.parametrize("name", [name for name in FLAGS if name not in NOT_OF_SGD])
@pytest.mark.parametrize("value", [lambda step: True, np.array(True), 1, None, "yes", bool],
                         ids=["schedule", "array", "int", "None", "str", "class"])
def test_flags_are_flags(name, value):
    """Neither scheduled nor an array's element: a step's equation does not change by itself."""
    words = re.escape(f"{name} must be True or False, got {value!r}")
    options = {"lr": 0.5, "momentum": 0.5}
    x, g = np.ones(3), np.ones(3)
    with pytest.raises(TypeError, match=words):
        optcore.SGD(x, **options, **{name: value})
    opt = optcore.SGD(x, **options)
    before = contents(opt)
    if name in OPTIMIZER_OPTIONS:
        with pytest.raises(TypeError, match=words):
            setattr(opt, name, value)
    else:
        opt.param_groups[0][name] = value
        with pytest.raises(TypeError, match=words):
            opt.step(g)
        opt.param_groups[0][name] = False
    assert contents(opt) == before
    for step in FUNCTIONS.values():
        if name in inspect.signature(step).parameters:
            arrays = [x, g, np.ones(3)][: 2 + (step is not optcore.sgd_step)]
            with pytest.raises(TypeError, match=words):
                step(*arrays, **(options if len(arrays) == 3 else {"lr": 0.5}), **{name: value})


# Schedules

N_STEPS = 6
# What each option is at each step; where momentum is 0 there is nothing to dampen
VALUES = {
    "lr": [0.1, 0.05, 0.0, 0.2, 0.3, 0.15],
    "momentum": [0.0, 0.0, 0.5, 0.9, 0.0, 0.7],
    "dampening": [0.0, 0.0, 0.3, 0.5, 0.0, 0.2],
    "weight_decay": [0.0, 0.1, 0.01, 0.0, 0.2, 0.3],
    "clip_value": [0.5, None, 0.0, 0.1, None, 0.8],
}


def test_every_schedule_is_tried():
    assert VALUES.keys() == set(SCHEDULED)


class Follower:
    """Parameters stepped by the reference, each by the rule that the options of a step say."""

    def __init__(self, rule, params):
        self.rule = rule
        self.params = [p.copy() for p in params]
        self.velocity = [np.zeros_like(p) for p in params]
        self.started = [False] * len(params)

    def step(self, grads, options):
        for i, g in enumerate(grads):
            if g is None:
                continue
            o = Options(**{**options, "first_step": not self.started[i]})
            if o.momentum == 0:
                self.params[i], _ = RULES_BY_ID["sgd"].reference(self.params[i], g, [], o)
                continue
            self.params[i], states = self.rule.reference(
                self.params[i], g, [self.velocity[i]], o)
            self.velocity[i] = states[0]
            self.started[i] = True


def recorded(values, counts, name):
    def schedule(step):
        counts.append((name, step))
        return values[step]

    return schedule


def scheduled_cases():
    for rule in LINEAR:
        if rule.sgd_options is None:        # SGD cannot be told to take it
            continue
        names = [name for name in SCHEDULED if (name != "dampening" or rule.dampens)
                 and (name != "momentum" or rule.has_momentum)]
        for chosen in [*[[name] for name in names], names]:
            yield pytest.param(rule, chosen, id=f"{rule.id}-{'+'.join(chosen)}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("rule", "chosen"), list(scheduled_cases()))
def test_schedules(rule, chosen, decoupled, n_groups, dtype, rng, cases):
    """Against the reference with each step's numbers; called once a step, with its count."""
    fixed = {"lr": 0.1, "momentum": 0.9 if rule.has_momentum else 0.0,
             "weight_decay": 0.05, "decoupled_weight_decay": decoupled}
    groups, followers, counts = [], [], []
    for k in range(n_groups):
        # the second group is two steps ahead of the first
        values = {name: VALUES[name][2 * k :] + VALUES[name][: 2 * k] for name in chosen}
        if rule.name == "nesterov" and "momentum" in values:
            values["momentum"] = [m or 0.25 for m in values["momentum"]]    # it cannot do without
        params = draw(rng, dtype)
        follower = Follower(rule, params)
        followers.append((follower, params, values))
        groups.append({"params": params, **{
            name: recorded(values[name], counts, (k, name)) for name in chosen}})
    opt = rule.optimizer(groups, **fixed)
    opt.state_dict()
    opt.track_grad_norm = True
    assert counts == []
    for step in range(N_STEPS):
        grads = [draw(rng, dtype) for _ in range(n_groups)]
        grads[0][step % 2] = None                   # so first steps differ
        opt.step([g for group in grads for g in group], grad_scale=[1.0, 0.5][step % 2])
        assert sorted(counts) == sorted(((k, name), step)
                                        for k in range(n_groups) for name in chosen)
        counts.clear()
        for (follower, params, values), given in zip(followers, grads, strict=True):
            follower.step(given, {
                **fixed, **{name: values[name][step] for name in chosen},
                "grad_scale": [1.0, 0.5][step % 2],
            })
            for p, q in zip(params, follower.params, strict=True):
                cases(same_bits(p, q))
    velocities = [entry["velocity"] for entry in opt.state_dict()["state"].values()]
    expected = [v for follower, *_ in followers for v in follower.velocity]
    if velocities[0] is not None:
        for v, w in zip(velocities, expected, strict=True):
            cases(same_bits(v, w))


def test_velocity_is_untouched_while_momentum_is_zero(rng):
    x, g = draw(rng)[:1], draw(rng)[:1]
    opt = optcore.SGD(x, lr=0.1, momentum=lambda step: 0.0 if step in (0, 2) else 0.9)
    seen = []
    for _ in range(4):
        opt.step(g)
        entry = opt.state_dict()["state"][0]
        seen.append((entry["velocity"], entry["first_step"]))
    assert [first for _, first in seen] == [True, False, False, False]
    assert not seen[0][0].any()
    assert same_bits(seen[1][0], g[0])
    assert same_bits(seen[2][0], seen[1][0])
    assert not same_bits(seen[3][0], seen[2][0])


@pytest.mark.parametrize("name", SCHEDULED)
def test_calls_and_skipped_steps(name, rng):
    """A skipped step asks with the count it would have had, which does not advance."""
    x, (g, *_) = np.ones(7), draw(rng)
    counts = []

    def schedule(step):
        counts.append(step)
        return 0.25

    opt = optcore.SGD(x, **{"lr": 0.1, "momentum": 0.5, name: schedule}, skip_nonfinite=True)
    bad = np.full_like(g, np.nan)
    assert [opt.step(each) for each in (g, g, bad, bad, g)] == [True, True, False, False, True]
    assert counts == [0, 1, 2, 2, 2]
    opt.param_groups[0]["weight_decay" if name != "weight_decay" else "lr"] = 0.125
    opt.step_replicas([g, g])           # groups are read again, which asks nothing more
    assert counts == [0, 1, 2, 2, 2, 3]
    opt.skip_nonfinite = False
    opt.state_dict()
    repr(opt)
    with pytest.raises(ValueError, match="grads has shape"):
        opt.step(g[:3].copy())
    opt.step(g)
    assert counts == [0, 1, 2, 2, 2, 3, 4, 4]


def two_groups(name, schedule, dtype=np.float32, **options):
    """Return an optimizer of two groups after one step, the second with a schedule."""
    rng = np.random.default_rng(4)
    a, b = draw(rng, dtype), draw(rng, dtype)
    given = {"lr": 0.5, "momentum": 0.5, **options}
    first = {key: given[key] for key in ("lr", "momentum")}
    opt = optcore.SGD(      # what the first group asks is taken before the second is refused
        [{"params": a, **first, "weight_decay": lambda step: 0.25, "lr": np.array(0.25)},
         {"params": b, **given, name: schedule}],
        ema_decay=0.5, **({"lr_in_velocity": True} if "lr_in_velocity" in given else {}),
    )
    grads = [*draw(rng, dtype), *draw(rng, dtype)]
    opt.step(grads)
    return opt, grads


BEYOND = {name: [-0.25, np.inf, -np.inf, 10**400, *([1.0, 1] if name in FRACTIONS else [])]
          for name in SCHEDULED}
NONSENSE = [
    *[(name, value, ValueError) for name in SCHEDULED for value in [*BEYOND[name], np.nan]],
    *[(name, value, TypeError) for name in SCHEDULED
      for value in [True, np.True_, "0.25", 0.25j, np.array([0.25, 0.5]), float, abs,
                    *([] if name in OPTIONAL else [None])]],
]


def first_then(good, then):
    return lambda step: then if step else good


@pytest.mark.parametrize(("name", "value", "error"), [
    pytest.param(*row, id=f"{row[0]}-{str(row[1])[:12]}") for row in NONSENSE
])
def test_nonsense_from_a_schedule(name, value, error):
    opt, grads = two_groups(name, first_then(0.25, value))
    before = contents(opt)
    with pytest.raises(error) as raised:
        opt.step(grads, zero_grad=True)
    assert str(raised.value).startswith(f"param_groups[1]: {name}(step_count) must be")
    assert f"got {value!r}" in str(raised.value)
    assert contents(opt) == before
    assert opt.step_count == 1
    # and it goes on as though it had not been asked
    twin, _ = two_groups(name, lambda step: 0.25)
    opt.param_groups[1][name] = 0.25
    assert opt.step(grads)
    twin.step(grads)
    twin.param_groups[1][name] = 0.25
    assert contents(opt) == contents(twin)


# What is left by dampening is rounded, not dampening
ROUNDED = [(name, value) for name in SCHEDULED
           for value in (1e-46, 1 - 1e-12 if name in FRACTIONS else 1e39)
           if (name, value) != ("dampening", 1 - 1e-12)]


@pytest.mark.parametrize(("name", "value"), ROUNDED)
def test_schedules_that_float32_would_round_away(name, value):
    """To zero, to infinity or to 1; float64 takes them."""
    opt, grads = two_groups(name, first_then(0.25, value))
    before = contents(opt)
    with pytest.raises(ValueError, match="float32") as raised:
        opt.step(grads)
    assert str(raised.value).startswith(f"param_groups[1]: {name}")
    assert contents(opt) == before
    assert opt.step_count == 1
    opt, grads = two_groups(name, first_then(0.25, value), dtype=np.float64)
    assert opt.step(grads)


def test_a_schedule_of_products_that_overflow():
    opt, grads = two_groups("lr", first_then(0.25, 1e30), weight_decay=lambda step: 1e30,
                            decoupled_weight_decay=False)
    opt.param_groups[1]["decoupled_weight_decay"] = True
    before = contents(opt)
    with pytest.raises(ValueError) as raised:   # noqa: PT011 - compared in full
        opt.step(grads)
    assert str(raised.value) == (
        "param_groups[1]: lr * weight_decay must be finite, got 1e+30 * 1e+30"
    )
    assert contents(opt) == before


# (option, its schedule after a good step, other options, message)
SCHEDULED_COMBINATIONS = [
    ("dampening", 0.25, {"nesterov": True}, "dampening must be 0 with nesterov, got 0.25"),
    ("dampening", 0.25, {"lr_in_velocity": True},
     "dampening must be 0 with lr_in_velocity=True, got 0.25"),
    ("momentum", 0.0, {"nesterov": True}, "nesterov must have momentum > 0, got momentum=0"),
    ("momentum", 0.0, {"dampening": 0.25}, "dampening must have momentum > 0, got momentum=0"),
]


@pytest.mark.parametrize(("name", "value", "options", "message"), SCHEDULED_COMBINATIONS)
def test_schedules_that_refuse_each_other(name, value, options, message):
    opt, grads = two_groups(name, first_then(0.5 * (name == "momentum"), value), **options)
    before = contents(opt)
    with pytest.raises(ValueError) as raised:   # noqa: PT011 - compared in full
        opt.step(grads)
    assert str(raised.value) == f"param_groups[1]: {message}"
    assert contents(opt) == before
    assert opt.step_count == 1


def test_a_scheduled_bound_beside_max_norm(rng):
    x, g = draw(rng), draw(rng)
    opt = optcore.SGD(x, lr=0.1, clip_value=lambda step: 0.5 if step == 1 else None, max_norm=1.0)
    opt.step(g)
    before = contents(opt)
    with pytest.raises(ValueError, match=r"^clip_value and max_norm exclude each other"):
        opt.step(g)
    assert contents(opt) == before
    opt.max_norm = None
    opt.step(g)
    opt.max_norm = 1.0
    opt.step(g)
    assert opt.step_count == 3


def test_a_bound_of_none_is_no_bound(rng):
    x, g = draw(rng), draw(rng)
    copies = [p.copy() for p in x]
    opt = optcore.SGD(x, lr=0.1, clip_value=lambda step: [None, 0.01, None][step])
    for bound in (None, 0.01, None):
        opt.step(g)
        for p, q, d in zip(x, copies, g, strict=True):
            optcore.sgd_step(q, d, lr=0.1, clip_value=bound)
            assert same_bits(p, q)


@pytest.mark.parametrize("value", [None, True, "x", 1.0, np.nan, -0.1, 1e-46, 1 - 1e-12])
def test_nonsense_for_an_average(value):
    """An average has been started, so None is none of its decays."""
    x, g = np.ones(3, np.float32), np.ones(3, np.float32)
    opt = optcore.SGD(x, lr=0.1, ema_decay=first_then(0.5, value))
    opt.step(g)
    x_before, e_before = x.copy(), opt.ema.copy()
    with pytest.raises((TypeError, ValueError), match=r"^ema_decay\(step_count\) must"):
        opt.step(g)
    assert same_bits(x, x_before)
    assert same_bits(opt.ema, e_before)
    assert opt.step_count == 1


def test_a_scheduled_average(rng):
    x, g = np.ones(7, np.float32), draw(rng, np.float32)[0]
    average, counts = x.copy(), []
    opt = optcore.SGD(x, lr=0.1, ema_decay=recorded([0.5, np.float32(0.3), np.array(0.9)], counts,
                                                    "ema_decay"))
    for step, decay in enumerate([0.5, float(np.float32(0.3)), 0.9]):
        opt.step(g)
        average = averaged(average, x, decay)
        assert same_bits(opt.ema, average)
        assert counts == [("ema_decay", k) for k in range(step + 1)]


@pytest.mark.parametrize("kind", [np.float32, np.array, lambda v: np.array([v]), Fraction, Own])
def test_schedules_return_any_number(kind):
    x, y = np.ones(3), np.ones(3)
    g = np.full(3, 0.7)
    opt = optcore.SGD(x, lr=lambda step: kind(0.3))
    opt.step(g)
    optcore.sgd_step(y, g, lr=float(np.float32(0.3)) if kind is np.float32 else 0.3)
    assert same_bits(x, y)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_that_raises(name):
    def schedule(step):
        if step:
            raise LookupError("out of table")
        return 0.25

    opt, grads = two_groups(name, schedule)
    before = contents(opt)
    with pytest.raises(LookupError, match="out of table"):
        opt.step(grads, zero_grad=True)
    assert contents(opt) == before
    assert opt.step_count == 1


def test_schedules_and_numbers_take_turns(rng):
    """An option becomes a schedule, and a number again, by an edit between steps."""
    x, g = draw(rng), draw(rng)
    follower = Follower(RULES_BY_ID["momentum"], x)
    opt = optcore.SGD(x, lr=0.1)
    for options, numbers in [
        ({"momentum": lambda step: 0.5}, {"momentum": 0.5}),
        ({"lr": lambda step: 0.3 * step}, {"momentum": 0.5, "lr": 0.3}),
        ({"momentum": 0.9}, {"momentum": 0.9, "lr": 0.6}),
        ({"lr": 0.2, "momentum": lambda step: 0.0}, {"lr": 0.2}),
        ({"momentum": 0.4}, {"lr": 0.2, "momentum": 0.4}),
    ]:
        opt.param_groups[0].update(options)
        opt.step(g)
        follower.step(g, {"lr": 0.1, **numbers})
        for p, q in zip(x, follower.params, strict=True):
            assert same_bits(p, q)


# Both dtypes in one optimizer

TYPES = {
    "one group": ([["float32", "float64"]], [True]),
    "one group, turned": ([["float64", "float32"]], [True]),
    "two groups": ([["float32"], ["float64"]], [True, False]),
    "two groups, turned": ([["float64"], ["float32"]], [False, True]),
    "three": ([["float64"], ["float64", "float32", "float64"], ["float64"]],
              [False, True, False]),
    "float64 alone": ([["float64"], ["float64"]], [False, False]),
}


@pytest.mark.parametrize(("dtypes", "has_float32"), TYPES.values(), ids=TYPES)
def test_rounding_is_checked_where_there_is_float32(dtypes, has_float32):
    """An option of a group by its own arrays, one of the whole optimizer by all."""
    def build(**options):
        groups = [{"params": [np.ones(3, dtype) for dtype in group]} for group in dtypes]
        opt = optcore.SGD(groups, lr=0.1, momentum=0.5, **options)
        opt.step(grads)
        return opt

    grads = [np.ones(3, dtype) for group in dtypes for dtype in group]
    for name, value in ROUNDED:
        for g, refused in enumerate(has_float32):
            for given in (value, lambda step, value=value: value, np.array(value)):
                opt = build()
                before, kept = contents(opt), opt.param_groups[g][name]
                opt.param_groups[g][name] = given
                if refused:
                    for _ in range(2):
                        with pytest.raises(ValueError, match=rf"{name}.* float32"):
                            opt.step(grads)
                    opt.param_groups[g][name] = kept
                    assert contents(opt) == before
                else:
                    assert opt.step(grads)
    for value in (1e-46, 1 - 1e-12):
        for decay in (value, lambda step, value=value: value):
            calls = [lambda decay=decay: build(ema_decay=decay),
                     lambda decay=decay: setattr(build(), "ema_decay", decay)]
            if not any(has_float32):
                for call in calls:
                    call()
            else:
                for call in calls[: 1 if callable(decay) else 2]:
                    with pytest.raises(ValueError, match=r"ema_decay.* float32"):
                        call()
    opt = build()
    for call in (lambda: opt.step(grads, grad_scale=1e-46),
                 lambda: opt.step_replicas([grads] * 4, grad_scale=2e-45)):
        if any(has_float32):
            with pytest.raises(ValueError, match=r"grad_scale .* float32"):
                call()
        else:
            assert call()


# Values that change in their place

def holders():
    yield "array0", np.array, lambda held, value: held.__setitem__(..., value)
    yield "array1", lambda v: np.array([v]), lambda held, value: held.__setitem__(0, value)
    yield "own", Own, lambda held, value: setattr(held, "value", value)
    if torch is not None:
        yield "tensor0", lambda v: torch.tensor(v, dtype=torch.float64), (
            lambda held, value: held.fill_(value))
        yield "tensor1", lambda v: torch.tensor([v], dtype=torch.float64), (
            lambda held, value: held.fill_(value))


HOLDERS = pytest.mark.parametrize(
    ("hold", "change"), [pytest.param(*row[1:], id=row[0]) for row in holders()]
)


@HOLDERS
@pytest.mark.parametrize("given", ["construction", "group", "edit"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_change_in_place_is_honoured(name, given, hold, change, rng):
    x, g = draw(rng), draw(rng)
    fixed = {"lr": 0.1, "momentum": 0.5}
    follower = Follower(RULES_BY_ID["momentum"], x)
    held = hold(0.5)
    if given == "construction":
        opt = optcore.SGD(x, **{**fixed, name: held})
    elif given == "group":
        opt = optcore.SGD([{"params": x, name: held}], **fixed)
    else:
        opt = optcore.SGD(x, **fixed)
        opt.param_groups[0][name] = held
    for value in (0.5, 0.25, 0.25, 0.75):
        change(held, value)
        opt.step(g)
        follower.step(g, {**fixed, name: value})
        for p, q in zip(x, follower.params, strict=True):
            assert same_bits(p, q)
    assert opt.param_groups[0][name] is held


@HOLDERS
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_state_has_the_number_then_current(name, hold, change):
    x, g = np.ones(3), np.ones(3)
    held = hold(0.5)
    opt = optcore.SGD(x, **{"lr": 0.1, "momentum": 0.5, name: held})
    opt.step(g)
    change(held, 0.25)
    state = opt.state_dict()
    change(held, 0.75)
    assert type(state["param_groups"][0][name]) is float
    assert state["param_groups"][0][name] == 0.25
    assert state["param_groups"][0]["schedules"] == []
    other = optcore.SGD(x.copy(), lr=0.1)
    other.load_state_dict(state)
    assert other.param_groups[0][name] == 0.25


@HOLDERS
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_change_in_place_is_checked(name, hold, change, rng):
    x, g = draw(rng, np.float32), draw(rng, np.float32)
    held = hold(0.5)
    opt = optcore.SGD([{"params": x[:2]}, {"params": x[2:], name: held}], lr=0.1, momentum=0.5)
    opt.step(g)
    copies = copy.deepcopy(x)
    for value in (-0.5, np.nan, 1e-46):
        change(held, value)
        with pytest.raises(ValueError, match=rf"^param_groups\[1\]: {name} must"):
            opt.step(g)
        assert all(same_bits(p, q) for p, q in zip(x, copies, strict=True))
        assert opt.step_count == 1
    change(held, 0.25)
    assert opt.step(g)


@HOLDERS
@pytest.mark.parametrize("name", SCHEDULED)
def test_no_state_has_a_value_that_a_step_would_refuse(name, hold, change):
    held = hold(0.5)
    opt = optcore.SGD(np.ones(3), **{"lr": 0.1, "momentum": 0.5, name: held})
    opt.step(np.ones(3))
    before = contents(opt)
    change(held, -0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} must"):
            opt.state_dict()
    change(held, 0.5)
    assert contents(opt) == before


@HOLDERS
def test_momentum_that_starts_in_its_place(hold, change, rng):
    x, g = draw(rng), draw(rng)
    follower = Follower(RULES_BY_ID["momentum"], x)
    held = hold(0.0)
    opt = optcore.SGD(x, lr=0.1, momentum=held)
    for momentum in (0.0, 0.9, 0.5, 0.0, 0.9):
        change(held, momentum)
        opt.step(g)
        follower.step(g, {"lr": 0.1, "momentum": momentum})
        for p, q in zip(x, follower.params, strict=True):
            assert same_bits(p, q)


# State

SCHEDULES = {
    "lr": lambda step: 0.1 / (1 + step), "momentum": lambda step: [0.0, 0.5, 0.9][min(step, 2)],
    "dampening": lambda step: [0.0, 0.25][step > 1], "weight_decay": lambda step: 0.01 * step,
    "clip_value": lambda step: [1.0, None][step % 2],
}
EVERY = [*[[name] for name in SCHEDULED], ["lr", "momentum", "clip_value"], SCHEDULED]


def numbers_of(names):
    """Numbers for what is not scheduled; without momentum, dampening is refused."""
    return {key: value for key, value in
            {"lr": 0.1, "momentum": 0.5, "clip_value": 2.0}.items() if key not in names}


def chosen_schedules(names):
    return {name: SCHEDULES[name] for name in names}


def run(opt, script):
    for grads in script:
        opt.step(grads)


@pytest.fixture
def script(rng):
    return [draw(rng) for _ in range(7)]


@pytest.mark.parametrize("names", EVERY, ids="+".join)
def test_state_of_schedules(names, script, rng):
    options = numbers_of(names)
    x = draw(rng)
    opt = optcore.SGD(x, **options, **chosen_schedules(names))
    run(opt, script[:3])
    state = copy.deepcopy(opt.state_dict())
    saved = state["param_groups"][0]
    assert state["version"] == 5
    assert saved["schedules"] == [name for name in SGD_OPTIONS if name in names]
    assert all(saved[name] is None for name in names)
    assert {name: saved[name] for name in options} == options
    y = copy.deepcopy(x)
    other = optcore.SGD(y, **{"lr": 7.0, **chosen_schedules(names)})
    other.load_state_dict(state)
    for name in names:
        assert other.param_groups[0][name] is SCHEDULES[name]
    run(opt, script[3:])
    run(other, script[3:])
    assert contents(opt) == contents(other)
    for name in names:
        rest = {k: v for k, v in chosen_schedules(names).items() if k != name}
        lacking = optcore.SGD(copy.deepcopy(x), **{"lr": 7.0, **rest})
        before = contents(lacking)
        words = f"was saved with a callable {name}: build the optimizer with one, got {name}="
        with pytest.raises(ValueError, match=rf"^state_dict\['param_groups'\]\[0\] {words}"):
            lacking.load_state_dict(state)
        assert contents(lacking) == before


@pytest.mark.parametrize("names", EVERY, ids="+".join)
def test_checkpoint_of_schedules(names, script, rng, tmp_path):
    path = tmp_path / "c"
    schedules = chosen_schedules(names)
    x = draw(rng)
    opt = optcore.SGD(x, **numbers_of(names), **schedules)
    run(opt, script[:3])
    opt.save(path, include_params=True)
    saved = checkpoint.read(path)["param_groups"][0]
    assert saved["schedules"] == [name for name in SGD_OPTIONS if name in names]
    assert all(saved[name] is None for name in names)
    restored = optcore.SGD(draw(rng), **{"lr": 7.0, **schedules})
    restored.restore(path)
    loaded = optcore.SGD.load(path, draw(rng), **schedules)
    grouped = optcore.SGD.load(path, [{"params": draw(rng), **schedules}])
    assert all(loaded.param_groups[0][name] is schedules[name] for name in names)
    for each in (opt, restored, loaded, grouped):
        run(each, script[3:])
    assert contents(opt) == contents(restored) == contents(loaded) == contents(grouped)
    for name in names:
        rest = {k: v for k, v in schedules.items() if k != name}
        words = f"was saved with a callable {name}"
        for wrong in ({}, {name: 0.1}, {name: None}):
            with pytest.raises(ValueError, match=f"{words}: give it again as {name}="):
                optcore.SGD.load(path, draw(rng), **{**rest, **wrong})
        with pytest.raises(optcore.CheckpointError, match=words):
            optcore.SGD(draw(rng), **{"lr": 7.0, **rest}).restore(path)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_where_a_number_was_saved(name, script, rng, tmp_path):
    """`load` refuses it, since it would be lost; `load_state_dict` puts the number in its place."""
    x = draw(rng)
    opt = optcore.SGD(x, **{"lr": 0.1, "momentum": 0.5, name: 0.25})
    run(opt, script[:2])
    own = optcore.SGD(copy.deepcopy(x), **{"lr": 0.1, name: SCHEDULES[name]})
    own.load_state_dict(opt.state_dict())
    assert own.param_groups[0][name] == 0.25
    opt.save(tmp_path / "c")
    for value in (SCHEDULES[name], 0.75):
        with pytest.raises(ValueError, match=f"^{name} must be left out, since .* holds it"):
            optcore.SGD.load(tmp_path / "c", draw(rng), **{name: value})
    loaded = optcore.SGD.load(tmp_path / "c", copy.deepcopy(x))
    for each in (opt, own, loaded):
        run(each, script[2:])
    assert same_bits(own.param_groups[0]["params"][0], x[0])
    assert same_bits(loaded.param_groups[0]["params"][0], x[0])


def test_schedules_of_one_group_of_two(script, rng, tmp_path):
    """Each group names its own; a keyword serves those that do not give theirs."""

    def groups(**second):
        return [{"params": {"a": np.ones(3)}}, {"params": {"b": np.ones(2)}, **second}]

    momentum = SCHEDULES["momentum"]
    opt = optcore.SGD(groups(momentum=momentum, nesterov=False), lr=SCHEDULES["lr"])
    grads = {"a": np.full(3, 0.3), "b": np.full(2, 0.7)}
    run(opt, [grads] * 2)
    assert [group["schedules"] for group in opt.state_dict()["param_groups"]] == [
        ["lr"], ["lr", "momentum"]]
    opt.save(tmp_path / "c", include_params=True)
    by_keyword = optcore.SGD.load(tmp_path / "c", groups(), lr=SCHEDULES["lr"], momentum=momentum)
    by_group = optcore.SGD.load(tmp_path / "c", groups(momentum=momentum), lr=SCHEDULES["lr"])
    for each in (opt, by_keyword, by_group):
        run(each, [grads] * 2)
    assert contents(opt) == contents(by_keyword) == contents(by_group)
    assert by_keyword.param_groups[0]["momentum"] == 0.0
    with pytest.raises(ValueError, match="was saved with a callable momentum"):
        optcore.SGD.load(tmp_path / "c", groups(), lr=SCHEDULES["lr"])


def as_version_1(state):
    """Return a state as the first version had it."""
    state = copy.deepcopy(state)
    assert all(set(group.pop("schedules")) <= {"lr"} for group in state["param_groups"])
    return {**state, "version": 1}


@pytest.mark.parametrize("clip_value", [None, 0.5])
@pytest.mark.parametrize("lr", [0.1, SCHEDULES["lr"]], ids=["number", "schedule"])
def test_states_of_version_1(lr, clip_value, script, rng, tmp_path):
    """Of its Nones, lr's was a schedule and clip_value's none."""
    options = {"lr": lr, "momentum": 0.5, "dampening": 0.25, "clip_value": clip_value}
    x = draw(rng)
    opt = optcore.SGD(x, **options)
    run(opt, script[:3])
    old = as_version_1(opt._contents(include_params=True))
    others = [optcore.SGD(draw(rng), lr=lr, clip_value=9.0)]
    others[0].load_state_dict(old)
    if callable(lr):
        with pytest.raises(ValueError, match="was saved with a callable lr"):
            optcore.SGD(draw(rng), lr=0.1).load_state_dict(old)
    try:
        checkpoint.write(tmp_path / "c", old)
    except ImportError:
        pass
    else:
        assert checkpoint.read(tmp_path / "c")["version"] == 1
        others.append(optcore.SGD(draw(rng), lr=lr))
        others[-1].restore(tmp_path / "c")
        again = {"lr": lr} if callable(lr) else {}
        others.append(optcore.SGD.load(tmp_path / "c", draw(rng), **again))
        if callable(lr):
            with pytest.raises(ValueError, match="was saved with a callable lr"):
                optcore.SGD.load(tmp_path / "c", draw(rng))
    run(opt, script[3:])
    for other in others:
        assert other.param_groups[0]["clip_value"] == clip_value
        run(other, script[3:])
        assert contents(other) == contents(opt)


@pytest.mark.parametrize("own", [None, 9.0, SCHEDULES["clip_value"]],
                         ids=["none", "number", "schedule"])
def test_no_bound_is_no_schedule(own, rng, tmp_path):
    state = optcore.SGD(draw(rng), lr=0.1).state_dict()
    assert state["param_groups"][0]["clip_value"] is None
    assert state["param_groups"][0]["schedules"] == []
    for saved in (state, as_version_1(state)):
        other = optcore.SGD(draw(rng), lr=0.1, clip_value=own)
        other.load_state_dict(saved)
        assert other.param_groups[0]["clip_value"] is None


@pytest.mark.parametrize("version", [6, 0, None, "2", 1.5])
def test_versions_to_come_are_refused(version, rng, tmp_path):
    opt = optcore.SGD(draw(rng), lr=0.1)
    state = {**opt._contents(include_params=False), "version": version}
    before = contents(opt)
    with pytest.raises(ValueError, match=rf"\['version'\] must be .* got {version!r}"):
        opt.load_state_dict(state)
    checkpoint.write(tmp_path / "c", state)
    with pytest.raises(optcore.CheckpointError, match=r"\['version'\] must be"):
        opt.restore(tmp_path / "c")
    assert contents(opt) == before


@pytest.mark.parametrize("schedules", [["nonsense"], ["params"], ["nesterov"], None, 3, "lr"])
def test_states_with_broken_schedules_change_nothing(schedules, rng):
    opt = optcore.SGD(draw(rng), lr=lambda step: 0.1)
    state = opt.state_dict()
    state["param_groups"][0]["schedules"] = schedules
    before = contents(opt)
    with pytest.raises((KeyError, TypeError, ValueError)):
        opt.load_state_dict(state)
    assert contents(opt) == before


@pytest.mark.parametrize("to_right", [False, True])
def test_conversion_asks_the_schedule(to_right, script, rng):
    """The convention of a velocity is converted by lr at the count that was saved."""
    counts = []
    x = draw(rng)
    opt = optcore.SGD(x, lr=0.25, momentum=0.5, lr_in_velocity=not to_right)
    opt.param_groups[0]["lr"] = lambda step: 0.25
    run(opt, script[:2])
    other = optcore.SGD(draw(rng), lr=recorded([1.0, 1.0, 0.25], counts, "lr"), momentum=0.5,
                        lr_in_velocity=to_right)
    other.load_state_dict(opt.state_dict())
    assert counts == [("lr", 2)]
    for mine, theirs in zip(other.state_dict()["state"].values(),
                            opt.state_dict()["state"].values(), strict=True):
        v = theirs["velocity"]
        assert same_bits(mine["velocity"], v * -0.25 if to_right else v / -0.25)


def test_a_state_dict_leaves_the_optimizers_own_options(rng):
    opt = optcore.SGD(draw(rng), lr=0.1, max_norm=1.0, skip_nonfinite=True, track_grad_norm=True,
                      ema_decay=0.5)
    state = opt.state_dict()
    for own in ({"ema_decay": 0.25}, {"ema_decay": 0.75, "max_norm": 3.0},
                {"ema_decay": 0.5, "track_grad_norm": True}):
        other = optcore.SGD(draw(rng), lr=0.2, **own)
        other.load_state_dict(state)
        assert {name: getattr(other, name) for name in OPTIMIZER_OPTIONS} == {
            **OPTIMIZER_OPTIONS, **own}
        assert other.param_groups[0]["lr"] == 0.1


# Options that refuse each other

# What is refused, the whole message, and what cures it
COMBINATIONS = [
    ({"nesterov": True, "momentum": 0.0},
     "nesterov must have momentum > 0, got momentum=0", {"momentum": 0.5}),
    ({"dampening": 0.25, "momentum": 0.0},
     "dampening must have momentum > 0, got momentum=0", {"momentum": 0.5}),
    ({"dampening": 0.25, "nesterov": True},
     "dampening must be 0 with nesterov, got 0.25", {"dampening": 0.0}),
    ({"dampening": 0.25, "lr_in_velocity": True},
     "dampening must be 0 with lr_in_velocity=True, got 0.25", {"dampening": 0.0}),
    ({"clip_value": 0.25, "max_norm": 0.5},
     "clip_value and max_norm exclude each other", {"clip_value": None}),
    ({"clip_value": 0.25, "max_norm": 0.0},
     "clip_value and max_norm exclude each other", {"max_norm": None}),
]


def test_the_table_says_how_each_refusal_reads():
    said = set()
    for row in OPTIONS.values():
        assert row.refused & ~sum(REFUSALS) == 0
        said |= {bit for bit in REFUSALS if row.refused & bit}
    assert said == set(REFUSALS)
    assert {name for name, row in OPTIONS.items() if row.refused} == {
        name for options, *_ in COMBINATIONS for name in options if OPTIONS[name].refused
    } | {"lr_in_velocity"}      # refused by rules that are yet to come
    for text in REFUSALS.values():
        assert text.startswith("{name} ")
        assert re.search(r"must have|must be (0|False) with|exclude each other", text)


@pytest.mark.parametrize(("options", "message", "cure"), COMBINATIONS)
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_combinations(options, message, cure, n_groups, dtype, rng):
    """At construction and by an edit or a setter; the cure that is named cures."""
    whole = {key: value for key, value in options.items() if key in OPTIMIZER_OPTIONS}
    own = {key: value for key, value in options.items() if key in SGD_OPTIONS}
    params, grads = draw(rng, dtype), draw(rng, dtype)

    def given(**last):
        if n_groups == 1:
            return [{"params": params, **last}]
        return [{"params": params[:2]}, {"params": params[2:], **last}]

    fixed = {"lr": 0.1, "momentum": 0.5,
             **{key: value for key, value in own.items() if key == "lr_in_velocity"}}
    prefix = "" if n_groups == 1 else "param_groups[1]: "
    with pytest.raises(ValueError) as raised:   # noqa: PT011 - compared in full
        optcore.SGD(given(**own), **fixed, **whole)
    assert str(raised.value) == prefix + message
    opt = optcore.SGD(given(), **fixed, **whole)
    before = contents(opt)
    opt.param_groups[-1].update(own)
    with pytest.raises(ValueError) as raised:   # noqa: PT011 - compared in full
        opt.step(grads)
    assert str(raised.value) == prefix + message
    opt.param_groups[-1].update({key: SGD_OPTIONS[key] for key in own if key not in fixed},
                                momentum=0.5)
    assert contents(opt) == before
    opt.param_groups[-1].update(own)
    for key, value in cure.items():
        if key in OPTIMIZER_OPTIONS:
            setattr(opt, key, value)
        else:
            opt.param_groups[-1][key] = value
    assert opt.step(grads)
    assert optcore.SGD(given(**{**own, **{k: v for k, v in cure.items() if k in own}}), **fixed,
                       **{**whole, **{k: v for k, v in cure.items() if k in whole}}).step(grads)


def test_a_setter_refuses_beside_a_group(rng):
    opt = optcore.SGD([{"params": draw(rng)}, {"params": draw(rng), "clip_value": 0.5}], lr=0.1)
    before = contents(opt)
    with pytest.raises(ValueError, match=r"^param_groups\[1\]: clip_value and max_norm exclude"):
        opt.max_norm = 1.0
    assert opt.max_norm is None
    assert contents(opt) == before


def test_functions_refuse_what_groups_do(rng):
    x, g, v = (rng.standard_normal(7) for _ in range(3))
    copies = [a.copy() for a in (x, g, v)]
    with pytest.raises(ValueError, match=r"^dampening must be 0 with lr_in_velocity=True"):
        optcore.momentum_step(x, g, v, lr=0.1, momentum=0.5, dampening=0.25, lr_in_velocity=True,
                              first_step=False)
    for first_step, decoupled in itertools.product([False, True], repeat=2):
        with pytest.raises(ValueError, match=r"^lr \* weight_decay must be finite"):
            optcore.momentum_step(
                x, g, v, lr=1e200, momentum=0.5, weight_decay=1e200, first_step=first_step,
                decoupled_weight_decay=True, maximize=decoupled,
            )
    assert all(same_bits(a, b) for a, b in zip((x, g, v), copies, strict=True))
