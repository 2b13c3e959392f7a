"""Why a bucket refused or failed, in words: what was found, what to do about it, and whether time alone can mend it."""

from dataclasses import dataclass

from trainer.errors import StorageError

ROLE = "roles/storage.objectAdmin"  # reads, writes, lists and deletes objects


@dataclass(frozen=True)
class Reason:
    """What an error of a store means."""

    found: str
    cure: str
    passes: bool  # whether trying again can help when nobody does anything


def reason_of(error: BaseException, address: str) -> Reason:
    """What an error that came out of a file system at `address` means. Buckets' libraries tell by type, code and wording."""
    bucket = address.removeprefix("gs://").partition("/")[0]
    code, text = getattr(error, "code", None), " ".join(str(error).split()) or type(error).__name__
    if code in (401, "401") or type(error).__name__ == "DefaultCredentialsError":
        cure = "`gcloud auth application-default login`, or point GOOGLE_APPLICATION_CREDENTIALS to a service account's key"
        return Reason(f"there are no credentials that the store takes (401: {text})", cure, passes=False)
    if code in (403, "403") or text.startswith("Forbidden") or isinstance(error, PermissionError):
        return Reason(f"the account may not do that (403: {text[:300]})", f"give it {ROLE} on {address}", passes=False)
    if isinstance(error, FileNotFoundError) or code in (404, "404"):
        cure = f"make it (gcloud storage buckets create gs://{bucket}), or name another"
        if not address.startswith("gs://"):
            cure = "make it, or name another"
        return Reason(
            f"there is no bucket {bucket!r} (404)" if address.startswith("gs://") else f"there is no {address}", cure, passes=False
        )
    if "bucket name" in text.lower():
        cure = "names are 3 to 63 lower-case letters, digits, '-', '_' and '.'"
        return Reason(f"{bucket!r} is no name of a bucket ({text[:200]})", cure, passes=False)
    if code in (429, "429"):
        return Reason("it asks for fewer requests (429)", "wait: it is tried again more and more slowly", passes=True)
    if type(error).__name__ in ("ClientConnectorError", "ClientConnectorDNSError", "TransportError", "ConnectionRefusedError"):
        return Reason(f"it cannot be reached ({text[:200]})", "see to the network; it is tried again", passes=True)
    return Reason(f"{type(error).__name__}: {text[:300]}", "it is tried again", passes=True)


def as_ours(error: BaseException, what: str, address: str) -> StorageError:
    """The StorageError that says what could not be done, why, and the way out."""
    reason = reason_of(error, address)
    ours = StorageError(f"{what}: {reason.found}; {reason.cure}")
    ours.retryable = reason.passes
    return ours
