"""How a dialect writes the module names of a family: prefix, spelling and separator, each read both ways.

Names whose dots were flattened to underscores are looked up among the family's own, never guessed back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from loraconv.registry import families
from loraconv.rules import Dialect, Family, Norm, Rename, Rule, Spelling, fill

#: Stands for any number in the shape of a name.
_ANY = "#"

#: What diffusers calls the parts of a pipeline that adapters are put on.
_PIPELINE = ("transformer", "transformer_2", "unet", "text_encoder", "text_encoder_2", "text_encoder_3")

Entry = tuple[Rule, int]


class Vocabulary:
    """Templates of module names, with number fields only, and the rule and target number that each stands for."""

    def __init__(self, entries: Iterable[tuple[str, Entry]], separator: str = ".") -> None:
        """Raises :class:`ValueError` where one name fits two templates once its dots are written as ``separator``."""
        self._separator = separator
        self._index: dict[tuple[str, ...], list[tuple[list[str], Entry]]] = {}
        for template, entry in entries:
            steps = template.replace(".", separator).split(separator)
            alike = self._index.setdefault(_shape(steps), [])
            if any(_meet(steps, others) for others, _ in alike):
                raise ValueError(f"ambiguous table: {template} and another are one name when written with {separator}")
            alike.append((steps, entry))

    def find(self, name: str) -> tuple[Rule, int, dict[str, str]] | None:
        """The rule and target number for ``name`` (with this separator), and the fields; None if it fits none."""
        steps = name.split(self._separator)
        for wanted, (rule, part) in self._index.get(_shape(steps), ()):
            fields: dict[str, str] = {}
            if all(_take(a, b, fields) for a, b in zip(wanted, steps, strict=True)):
                return rule, part, fields
        return None


def _shape(steps: Iterable[str]) -> tuple[str, ...]:
    return tuple(_ANY if step[:1] == "{" or _is_number(step) else step for step in steps)


def _is_number(step: str) -> bool:
    return step.isascii() and step.isdecimal() and (step[0] != "0" or step == "0")


def _meet(one: list[str], other: list[str]) -> bool:
    return all(a == b or "{" in (a[:1], b[:1]) for a, b in zip(one, other, strict=True))


def _take(wanted: str, step: str, fields: dict[str, str]) -> bool:
    return fields.setdefault(wanted[1:-1], step) == step if wanted[:1] == "{" else wanted == step


class Naming:
    """One way in which a dialect writes the names of a family's modules."""

    def __init__(self, dialect: Dialect, family: Family, place: int, spelling: str) -> None:
        """``place``: which of the dialect's prefixes."""
        self.dialect, self.family, self.place, self._spelling = dialect, family, place, spelling
        prefix = dialect.prefixes[place]
        short = {c: dialect.components.get(c, c) for c in had(dialect, family)} or {"": ""}
        # Components that would share a prefix have names that do not tell which is meant: only the first has any.
        first = {fill(prefix, {"component": text}): c for c, text in reversed(short.items())}
        self.prefixes: Mapping[str, str] = {c: text for text, c in reversed(first.items())}
        self.begins = tuple(self.prefixes.values())

    @property
    def prefix(self) -> str:
        """What stands before the names of the (first) component's modules."""
        return next(iter(self.prefixes.values()))

    @property
    def spelling(self) -> Spelling | None:
        """The family's spelling; None where names are diffusers' own."""
        return self.family.spellings[self._spelling] if self._spelling else None

    def find(self, written: str) -> tuple[Rule, dict[str, str]] | None:
        """The rule for a module name as it stands in the file (prefix and all), with the fields of the match."""
        for component, prefix in self.prefixes.items():
            if written.startswith(prefix):
                words = _theres(self.family.name, self._spelling, self.dialect.separator, component)
                name = written[len(prefix) :]
                found = words.find(name)
                if found is None and component.startswith("text_encoder"):
                    # transformers 5 builds a CLIPTextModel without this step, and trainers write what they see.
                    found = words.find(f"text_model{self.dialect.separator}{name}")
                if found is not None:
                    return found[0], found[2]
        return None

    def write(self, module: str) -> tuple[str, Rule, int] | None:
        """The name in the file for a module (diffusers name), the rule, and the number of the module among its targets;
        None if this dialect has no name for it."""
        found = _heres(self.family.name, self._spelling).find(module)
        if found is None:
            return None
        rule, part, fields = found
        component, there = in_component(self.family, fill(rule.there, fields))
        if component not in self.prefixes:
            return None
        return self.prefixes[component] + there.replace(".", self.dialect.separator), rule, part

    def names(self, norms: bool = False) -> list[str]:
        """Every name that the dialect has for modules of the first layer, or norms, to show what is near an unknown
        one."""
        rules = [rule for rule in _rules(self.family, self._spelling) if isinstance(rule, Norm) == norms]
        first = [fill(rule.targets[0], dict.fromkeys("ijkl", "0")) for rule in rules]
        return [found[0] for module in first if (found := self.write(module)) is not None]


def components(family: Family) -> tuple[str, ...]:
    """The pipeline components that a family's adapters belong to; none for a model of another kind. Where there are
    several, module names begin with theirs, but for those of the family's own ``component``."""
    if family.component:
        return (family.component, *dict.fromkeys(name.partition(".")[0] for name in family.beside))
    first = dict.fromkeys(rule.targets[0].partition(".")[0] for rule in _rules(family, ""))
    return tuple(step for step in first if step in _PIPELINE)


def in_component(family: Family, module: str) -> tuple[str, str]:
    """The component that a module (diffusers name) belongs to, and its name there; no component for a model of another
    kind."""
    component, _, name = module.partition(".")
    known = components(family)
    if not known or (family.component and component not in known[1:]):
        return family.component, module
    return component, name


def had(dialect: Dialect, family: Family) -> tuple[str, ...]:
    """The components of a family that a dialect has."""
    return tuple(c for c in components(family) if not dialect.components or c in dialect.components)


@cache
def namings(dialect: str, family: str) -> tuple[Naming, ...]:
    """Every way in which a dialect may write a family's modules, the one that is written first (all by name)."""
    from loraconv.registry import dialect as dialect_of

    table, model = dialect_of(dialect), _family(family)
    if not had(table, model) and (components(model) or not table.any_model):
        return ()
    spellings = [s for s in table.spellings if not s or s in model.spellings]
    return tuple(Naming(table, model, n, spelling) for spelling in spellings for n in range(len(table.prefixes)))


def _family(name: str) -> Family:
    return next(f for f in families() if f.name == name)


@cache
def _own_names(family: str) -> tuple[Rule, ...]:
    model = _family(family)
    targets = [t for s in model.spellings.values() for rule in s.rules for t in rule.targets]
    names = (name for name in dict.fromkeys([*model.modules, *targets]) if name not in model.norms)
    return (*(Rename(name, name) for name in names), *(Norm(name, name) for name in model.norms))


def _rules(family: Family, spelling: str) -> tuple[Rule, ...]:
    beside = (Rename(name, name) for name in family.beside)
    if not spelling:
        return (*_own_names(family.name), *beside)
    return (*family.spellings[spelling].rules, *family.spellings[spelling].norms, *beside)


@cache
def _theres(family: str, spelling: str, separator: str, component: str) -> Vocabulary:
    model = _family(family)
    placed = ((in_component(model, rule.targets[0])[0], rule) for rule in _rules(model, spelling))
    own = (rule for part, rule in placed if part == component)
    return Vocabulary(((in_component(model, rule.there)[1], (rule, 0)) for rule in own), separator)


@cache
def _heres(family: str, spelling: str) -> Vocabulary:
    rules = _rules(_family(family), spelling)
    return Vocabulary((here, (rule, part)) for rule in rules for part, here in enumerate(rule.targets))
