"""BFCL's own checker of calls, in a process of its own: python -I bfcl_reference.py WHEEL_OR_FOLDER

Reads questions as JSON lines on standard input, {"functions", "calls", "gold", "language", "category"}, and answers
each with {"valid"} and, to be read, {"error_type"}. The package is imported without what it requires: the checker wants
only a table of models, which stands in here, and says of our one model that dots in names of functions become
underscores.
"""

import json
import sys
import types


def main() -> None:
    """Answer until the input ends."""
    sys.path.insert(0, sys.argv[1])
    table = types.ModuleType("bfcl_eval.constants.model_config")
    table.MODEL_CONFIG_MAPPING = {"student": types.SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
    sys.modules[table.__name__] = table
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    answers, sys.stdout = sys.stdout, sys.stderr  # their converters print
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = ast_checker(asked["functions"], asked["calls"], asked["gold"], Language(asked["language"]),
                                asked["category"], "student")  # fmt: skip
            answer = {"valid": bool(found["valid"]), "error_type": str(found.get("error_type", ""))}
        except Exception as error:  # whatever it raises is its answer
            answer = {"valid": False, "error_type": f"raises {type(error).__name__}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
