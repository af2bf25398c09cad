// What Go programs write, timed as close_loop.c is: the same closes, of connections that this process makes itself.
//
// Built on the spot by compiled.py, where there is a Go compiler. Reads lines "kind count" and answers each with a line:
// the nanoseconds that closing `count` connections took. Kinds: abort, background, graceful, half-close, and handover,
// which leaves the rest of a half-closed connection to a goroutine. With the argument "serve" it is a one-thread HTTP
// server for http_closer.py in place of that.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
)

const patience = 2 * time.Second

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "close_loop.go:", err)
		os.Exit(1)
	}
}

func connected(count int, peersHaveClosed bool) (ours, peers []*net.TCPConn) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	defer listener.Close()
	for i := 0; i < count; i++ {
		one, err := net.Dial("tcp", listener.Addr().String())
		must(err)
		other, err := listener.Accept()
		must(err)
		if peersHaveClosed {
			must(other.Close())
		}
		ours, peers = append(ours, one.(*net.TCPConn)), append(peers, other.(*net.TCPConn))
	}
	return ours, peers
}

func drain(conn *net.TCPConn) {
	conn.SetReadDeadline(time.Now().Add(patience))
	io.Copy(io.Discard, conn)
	conn.Close()
}

func closeBatch(kind string, count int) time.Duration {
	ours, peers := connected(count, kind == "graceful")
	start := time.Now()
	switch kind {
	case "abort", "background":
		seconds := map[string]int{"abort": 0, "background": -1}[kind]
		for _, conn := range ours {
			conn.SetLinger(seconds)
			conn.Close()
		}
	case "graceful":
		for _, conn := range ours {
			conn.CloseWrite()
			drain(conn)
		}
	case "half-close":
		for _, conn := range ours {
			conn.CloseWrite()
		}
	case "handover":
		for _, conn := range ours {
			conn.CloseWrite()
			go drain(conn)
		}
	default:
		must(fmt.Errorf("unknown kind %q", kind))
	}
	taken := time.Since(start)
	for i := range ours {
		peers[i].Close()
		if kind != "handover" {
			ours[i].Close()
		}
	}
	return taken
}

// serve answers and closes as http_closer.py's other servers do: it prints its port, and at each SIGUSR1 how many
// requests it has served and its CPU time in ns.
func serve(answer, refusal []byte) {
	runtime.GOMAXPROCS(1)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	var served atomic.Int64
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1)
	go func() {
		for range asked {
			var used syscall.Rusage
			must(syscall.Getrusage(syscall.RUSAGE_SELF, &used))
			fmt.Println(served.Load(), used.Utime.Nano()+used.Stime.Nano())
		}
	}()
	request := make([]byte, 65536)
	for {
		conn, err := listener.Accept()
		must(err)
		tcp := conn.(*net.TCPConn)
		n, _ := tcp.Read(request)
		if n >= 4 && string(request[:4]) == "POST" {
			tcp.Write(refusal)
		} else {
			tcp.Write(answer)
		}
		tcp.CloseWrite()
		go drain(tcp)
		served.Add(1)
	}
}

func main() {
	if len(os.Args) == 4 && os.Args[1] == "serve" {
		answer, err := os.ReadFile(os.Args[2])
		must(err)
		refusal, err := os.ReadFile(os.Args[3])
		must(err)
		serve(answer, refusal)
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var kind string
		var count int
		_, err := fmt.Sscan(lines.Text(), &kind, &count)
		must(err)
		fmt.Println(closeBatch(kind, count).Nanoseconds())
	}
}
