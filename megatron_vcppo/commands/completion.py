"""vcppo completion: a script for bash or zsh that completes commands, options, and keys of the configuration."""

import argparse
import importlib
import pkgutil
import shlex

from megatron_vcppo import commands
from megatron_vcppo.config.keys import all_keys

_BASH = """\
_vcppo() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" command="" word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in
            {names}) command="$word"; break ;;
        esac
    done
    COMPREPLY=()
    if [ -z "$command" ]; then
        COMPREPLY=($(compgen -W {commands} -- "$cur"))
        return
    fi
    local options="" choices="" keys=""
    case "$command" in
{cases}
    esac
    case "$cur" in
        -*) COMPREPLY=($(compgen -W "$options" -- "$cur")) ;;
        *)
            COMPREPLY=($(compgen -W "$choices" -- "$cur"))
            if [ -n "$keys" ] && [ -n "$cur" ]; then
                local found=($(compgen -S = -W {keys} -- "$cur"))
                if [ "${{#found[@]}}" -gt 0 ]; then
                    COMPREPLY+=("${{found[@]}}")
                    compopt -o nospace 2>/dev/null
                fi
            fi ;;
    esac
}}
complete -o bashdefault -o default -F _vcppo vcppo
"""
"""Where nothing of it fits, the shell completes file names."""
_ZSH = """\
(( $+functions[compdef] )) || {{ autoload -Uz compinit && compinit -i; }}
_vcppo() {{
    local command="" word options="" choices="" keys=""
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "$word" in
            {names}) command="$word"; break ;;
        esac
    done
    if [[ -z "$command" ]]; then
        compadd -- {names_as_words}
        return
    fi
    case "$command" in
{cases}
    esac
    if [[ "$PREFIX" == -* ]]; then
        compadd -- ${{=options}}
        return
    fi
    compadd -- ${{=choices}}
    if [[ -n "$keys" && -n "$PREFIX" ]]; then
        keys={keys}
        compadd -S = -- ${{=keys}}
    fi
    (( compstate[nmatches] )) || _files
}}
compdef _vcppo vcppo
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "completion",
        description='Print a completion script. In ~/.bashrc: eval "$(vcppo completion bash)"; in ~/.zshrc the same '
        "with zsh.",
    )
    parser.add_argument("shell", choices=("bash", "zsh"), help="for which shell")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    print(script(args.shell), end="")
    return 0


def script(shell: str) -> str:
    """The completion of every command, from the parsers themselves."""
    subparsers = argparse.ArgumentParser().add_subparsers()
    for found in pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."):
        module = importlib.import_module(found.name)
        if hasattr(module, "add_parser"):
            module.add_parser(subparsers)
    names, cases = [*subparsers.choices], []
    for name in names:
        options, words, takes_keys = _completions(subparsers.choices[name])
        line = f"        {name}) options={shlex.quote(' '.join(options))} choices={shlex.quote(' '.join(words))}"
        cases.append(line + (" keys=1" if takes_keys else "") + " ;;")
    return (_ZSH if shell == "zsh" else _BASH).format(
        names="|".join(names),
        names_as_words=" ".join(names),
        commands=shlex.quote(" ".join(names)),
        cases="\n".join(cases),
        keys=shlex.quote(" ".join(all_keys())),
    )


def _completions(parser: argparse.ArgumentParser) -> tuple[list[str], list[str], bool]:
    """Options, fixed words, and whether key=value may follow; of sub-commands, too."""
    options: list[str] = []
    words: list[str] = []
    takes_keys = False
    for action in parser._actions:
        options += action.option_strings
        takes_keys |= action.dest == "overrides"
        if isinstance(action, argparse._SubParsersAction):
            words += action.choices
            for child in dict.fromkeys(action.choices.values()):
                more_options, more_words, keys = _completions(child)
                options, words, takes_keys = options + more_options, words + more_words, takes_keys or keys
        elif action.choices is not None and not action.option_strings:
            words += [str(choice) for choice in action.choices]
    return [*dict.fromkeys(options)], [*dict.fromkeys(words)], takes_keys
