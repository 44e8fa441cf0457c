"""All bytes that enter or leave: files of this machine, remote stores, JSON documents, archives."""
