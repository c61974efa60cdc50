"""The scratch folder, which a hostile program may have filled: emptied and measured without recursion."""

import itertools
import os


def empty(folder: str) -> None:
    """Remove everything below the folder. What lies deep is moved up first, so no depth and no length is too much."""
    unique = itertools.count()
    while names := os.listdir(folder):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.islink(path) or not os.path.isdir(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):
                _move_up(os.path.join(path, inner), os.path.join(folder, f".{next(unique)}_{os.getpid()}"))
            os.rmdir(path)


def _move_up(path: str, target: str) -> None:
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    os.chmod(path, 0o700)  # moving a folder rewrites the ".." in it
    while os.path.lexists(target):
        target += "_"
    os.rename(path, target)


def is_over(folder: str, max_bytes: int, max_files: int) -> bool:
    """Whether the folder holds more than that; a tree too deep to be measured counts as more."""
    num_bytes = num_files = 0
    folders = [folder]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    num_files += 1
                    num_bytes += entry.stat(follow_symlinks=False).st_size
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    if num_bytes > max_bytes or num_files > max_files:
                        return True
    except FileNotFoundError:  # the program removes files while we look
        return False
    except OSError as error:
        return error.errno != 13  # a folder without rights is small
    return False
