"""Whether a server answers, asked with a deadline that holds."""

import queue
import threading
import urllib.error
import urllib.request


def problem_reaching(url: str, seconds: float) -> Exception | None:
    """None if a server answers a HEAD request for `url` within `seconds`, in any way; otherwise the error."""
    answer: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answer.put(None)
        except urllib.error.HTTPError as error:
            error.close()  # the server answers, and may only reject HEAD
            answer.put(None)
        except Exception as error:
            answer.put(error)

    # In a thread, because the timeout of urlopen does not hold for looking up the host's name.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=seconds)
    except queue.Empty:
        return TimeoutError(f"no answer within {seconds:g} s")
