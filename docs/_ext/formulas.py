"""Renders the formulas of docstrings as mathematics.

Docstrings write formulas in Unicode, which is readable in `help()`: `loss = −Σ_k t_k log p_k`. This extension finds the formulas,
translates them to TeX, and leaves the words around them as they are. It also makes a link of each public name in backticks.
"""

import re

FUNCTIONS = (
    *("log", "exp", "max", "min", "cos", "sin", "arccos", "tanh", "sign", "argmax", "softmax", "softplus", "digamma", "lse"),
    *("log_t", "log_t1", "log_t2", "exp_t", "exp_t1", "exp_t2", "lse_y"),
)
WORDS = set(  # names of several letters in formulas; every other word of several letters is prose
    """
    loss loss_i labels hidden kernel bias head projection order clip counts length features width softcap confidence hit
    hits score accuracy mean total weight value result auroc shortlist cutoff student teacher queries candidates signs nodes
    examples bins max_margin label_probs label_ids JS logits predicted true div_value mixture_logits log_scales
    label_probs_j label_ids_j perplexity margin nll nll_i confidences confidences_b
    chosen rejected mean_chosen mean_rejected reference reference_chosen reference_rejected log_probs old_log_probs reward
    clip low high clip_low clip_high
    """.split()
)
STANDARD = {"log", "exp", "max", "min", "cos", "sin", "arccos", "tanh"}  # TeX knows them
PROSE = set(  # words of one or two letters that are not names
    """
    is of at if be or as in on to by so no an it we do up At If In On It So a A I
    """.split()
)
SIGNS = {
    "Σ": r"\sum ",
    "Π": r"\prod ",
    "·": r"\cdot ",
    "−": "-",
    "½": r"\tfrac12 ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∈": r"\in ",
    "∝": r"\propto ",
    "±": r"\pm ",
    "…": r"\dots ",
    "‖": r"\,\|\,",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∂": r"\partial ",
    "ℓ": r"\ell ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "ε": r"\varepsilon ",
    "ζ": r"\zeta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "π": r"\pi ",
    "ρ": r"\rho ",
    "σ": r"\sigma ",
    "τ": r"\tau ",
    "θ": r"\theta ",
    "ψ": r"\psi ",
    "ω": r"\omega ",
    "β": r"\beta ",
    "α": r"\alpha ",
    "Δ": r"\Delta ",
    "φ": r"\varphi ",
    "′": r"^{\prime}",
    "Γ": r"\Gamma ",
}
_TOKEN = re.compile(r"``.*?``|`[^`]*`|\s+|[^\s`]+")
_OPERATORS = set("=Σ∂·^≤≥<>≠∝∈½√∞‖⌊⌈σΓ|_")
_SUPERSCRIPTS = str.maketrans("⁻⁰¹²³⁴", "-01234")


def is_formula(token: str) -> bool:
    """Whether a token between spaces can be a part of a formula."""
    bare = token.strip("()[]{}.,;:")
    if not bare:
        return token in ("(", ")")
    names = re.findall(r"[^\W\d_⁰¹²³⁴]+(?:_[^\W\d_⁰¹²³⁴]+)*", bare)
    known = all(_known(name) for name in names)
    return known and token not in PROSE and bare not in PROSE - {"a", "A", "I"} and not re.fullmatch(r"\.\.\.|-+|–|\".*\"", bare)


def _known(name: str) -> bool:
    parts = name.split("_")
    return name in FUNCTIONS or name in WORDS or all(len(p) <= 2 or p in WORDS or p in FUNCTIONS for p in parts)


def tex(formula: str) -> str:
    """The formula in TeX."""
    s = re.sub(r"\^([^\W\d_])([₊₋])", r"^{\1\2}", formula)
    s = re.sub(r"= \{([^{}]*)\}", r"= \\{\1\\}", s)
    s = re.sub(r"([⁻⁰¹²³⁴]+)", lambda m: "^{" + m[1].translate(_SUPERSCRIPTS) + "}", s)
    s = s.replace("₊", "_+").replace("₋", "_-").replace("p̂", r"\hat p").replace("ᵀ", r"^{\mathsf T}")
    s = _groups(s)
    s = re.sub(r"_([^\W\d_]{2}|[^\W_]\d)(?![\w{])", r"_{\1}", s)  # p_ij
    for name in sorted({*FUNCTIONS, *WORDS}, key=len, reverse=True):
        if "_" in name:
            head, _, index = name.partition("_")
            written = (
                rf"\\mathrm{{{head}}}_{{{index}}}" if name in FUNCTIONS or name == "loss_i" else rf"\\mathrm{{{name.replace('_', '~')}}}"
            )
        else:
            written = (rf"\\{name} " if name in STANDARD else rf"\\operatorname{{{name}}}") if name in FUNCTIONS else rf"\\mathrm{{{name}}}"
        s = re.sub(rf"(?<![\w\\{{~]){re.escape(name)}(?![^\W_]|_[^\W\d_]{{2,}})", written, s)
    for sign, written in SIGNS.items():
        s = s.replace(sign, written)
    return re.sub(r"\s+", " ", s).strip()


def _groups(s: str) -> str:
    """`^(a + b)` and `_(a + b)` with braces instead of the parentheses."""
    out, closing, depth = [], [], 0
    for i, c in enumerate(s):
        if c == "(":
            depth += 1
            if i and s[i - 1] in "^_":
                closing.append(depth)
                c = "{"
        elif c == ")":
            if closing and closing[-1] == depth:
                closing.pop()
                c = "}"
            depth -= 1
        out.append(c)
    return "".join(out)


def render(line: str, link) -> str:
    """The line in reStructuredText; `link` turns a name in backticks into a role or a literal."""
    out, run = [], []

    def finish():
        text = "".join(run)
        run.clear()
        core = text.rstrip()
        tail = text[len(core) :]
        end = re.search(r"[.,;:]+$", core)
        core, tail = (core[: end.start()], end[0] + tail) if end else (core, tail)
        lead = re.match(r"^\s*", core)[0]
        core = core[len(lead) :]
        balanced = all(core.count(a) == core.count(b) for a, b in ("()", "[]", "{}"))
        out.append(f"{lead}:math:`{tex(core)}`{_joined(tail)}" if balanced and _OPERATORS & set(core) else _escaped(text))

    tokens = _TOKEN.findall(line)
    for i, token in enumerate(tokens):
        after = tokens[i + 2] if i + 2 < len(tokens) else ""  # tokens[i + 1] is space
        if token.startswith("`"):
            finish()
            joined = i + 1 < len(tokens) and tokens[i + 1][0].isalnum()  # `name`s
            out.append(link(token.strip("`")) + ("\\ " if joined else ""))
        elif token.isspace() or is_formula(token) or (token in ("a", "A", "I") and after in ("=", "<", "≤", "−", "+")):
            run.append(token)
            text = "".join(run)
            if token[-1] in ".;:" and all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}")):
                finish()
        else:
            finish()
            out.append(_escaped(token))
    finish()
    return "".join(out)


def _joined(tail: str) -> str:
    return tail if not tail or tail[0].isspace() or tail[0] in ".,;:" else "\\ " + tail


def _escaped(text: str) -> str:
    return re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", text)


SECTION = re.compile(r"(Args|Returns|Raises|Example|Reference):$")


def restructured(lines: list[str], link) -> list[str]:
    """The lines of a docstring in Google's format, with formulas and links in reStructuredText."""
    out, paragraph, section, in_list = [], [], None, False

    def finish():
        if paragraph:
            text = render(" ".join(paragraph), link)
            out.append("\\ " + text if text.startswith(":") else text)  # a colon would start a field list
            paragraph.clear()

    for line in lines:
        header = SECTION.match(line)
        if header:
            section = header[1]
        if section == "Example" or header:
            finish()
            out.append(line)
        elif section:
            name, text = re.match(r"(\s+[\w*]+(?:, [\w*]+)*:)?(.*)", line).groups()
            out.append((name or "") + (_backticks(text, link) if section == "Reference" else render(text, link)))
        elif not line.strip():
            finish()
            out.append("")
        elif line.startswith((" ", "-")):
            finish()
            if line.startswith("-") and not in_list and out and out[-1]:
                out.append("")
            in_list = in_list or line.startswith("-")
            out.append(render(line, link) if in_list else "| " + render(line.strip(), link))
        else:
            if in_list or (out and out[-1].startswith("|")):
                out.append("")
                in_list = False
            if line.startswith("Gradient") and paragraph:
                finish()
                out.append("")
            paragraph.append(line)
    finish()
    return out


def _backticks(line: str, link) -> str:
    return re.sub(r"`([^`]+)`", lambda m: link(m[1]), line)
